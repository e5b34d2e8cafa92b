"""Numbers with units, as people write them."""

from __future__ import annotations

__all__ = ["duration", "roughly", "size"]


def roughly(seconds: float) -> str:
    """A duration that is only known to about two digits: 14 s, 2.5 min, 36 h."""
    length, unit = (1, "s") if seconds < 100 else (60, "min") if seconds < 6000 else (3600, "h")
    return f"{float(f'{seconds / length:.2g}'):g} {unit}"


def size(count: float) -> str:
    """Bytes in decimal units: 961 kB, 1.92 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def duration(seconds: float) -> str:
    """A measured duration: 1.3 s, 12.5 min, 1.2 h."""
    return (
        f"{seconds:.1f} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
