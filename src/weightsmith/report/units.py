"""Numbers with units, as people write them."""

from __future__ import annotations

__all__ = ["roughly"]


def roughly(seconds: float) -> str:
    """A duration that is only known to about two digits: 14 s, 2.5 min, 36 h."""
    length, unit = (1, "s") if seconds < 100 else (60, "min") if seconds < 6000 else (3600, "h")
    return f"{float(f'{seconds / length:.2g}'):g} {unit}"
