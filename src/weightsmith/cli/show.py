"""How things are printed: tables and sizes for people, JSON for programs, progress on a terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError
from weightsmith.io import system
from weightsmith.io.disk import write_file
from weightsmith.io.url import Url, stored_at
from weightsmith.report.units import duration, roughly, size

__all__ = ["duration", "printable", "progress_bar", "roughly", "say", "show_json", "size", "table", "warn"]


def printable(text: object) -> str:
    """Text from files (tensor names, labels) without the control characters that could drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in str(text))


def say(text: str = "") -> None:
    sys.stdout.write(printable(text) + "\n")


def warn(text: object) -> None:
    """Say a warning, or a problem as what it is."""
    sys.stderr.write(f"{getattr(text, 'kind', 'warning')}: {printable(text)}\n")


def show_json(value: Any) -> None:
    """One JSON document; what JSON cannot say (infinities, paths, dataclasses) in the nearest words."""
    sys.stdout.write(json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Url):
        return str(value)  # without what it keeps to itself
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> None:
    """A table; columns listed in `right` are numbers.  Plain aligned text where nobody looks at it."""
    if not rows:
        return
    cells = [[printable(c).replace("\n", " ") for c in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(title, columns, cells, right)
        return
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    say(title)
    for line in [list(columns), *cells]:
        parts = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        say("  " + "  ".join(parts).rstrip())
    say()


def _rich_table(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i in right else "left", overflow="fold")
    for row in cells:
        shown.add_row(*(Text(c) for c in row))
    Console().print(shown)


@contextmanager
def progress_bar(text: str, *, quiet: bool, nbytes: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr with rate and time left; gives (done, total) -> None, or None where nobody would see it.

    Where WEIGHTSMITH_PROGRESS names a file, it is written there instead, for a program that shows it.
    """
    if file := os.environ.get("WEIGHTSMITH_PROGRESS"):
        yield _noted(Path(file), "bytes" if nbytes else "")
        return
    if quiet or not sys.stderr.isatty():
        if not quiet and nbytes:  # a merge, which uses them
            from weightsmith.kernels import native

            native.announce = lambda text: print(text, file=sys.stderr)
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from weightsmith.kernels import native

    counts = [DownloadColumn(), TransferSpeedColumn()] if nbytes else [MofNCompleteColumn()]
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn(), console=Console(stderr=True)
    )
    native.announce = bar.console.print
    task = bar.add_task(text, total=None)
    last = [0.0]

    def update(done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - last[0] > 0.05:  # called for every block, from every thread
            last[0] = now
            bar.update(task, completed=done, total=total)

    with bar:
        yield update


def _noted(file: Path, unit: str) -> Callable[[int, int], None]:
    """Progress as one JSON object in a file: {done, total, first, seconds, unit}; `first`: done when it began."""
    began: list[float] = []
    last = [0.0]

    def update(done: int, total: int) -> None:
        now = time.monotonic()
        if not began:
            began[:] = [now, done]
        if done >= total or now - last[0] > 0.1:
            last[0] = now
            noted = {"done": done, "total": total, "first": began[1], "seconds": now - began[0], "unit": unit}
            staged = file.with_name(f".{file.name}.{threading.get_ident()}")
            with suppress(OSError, OutputError):  # a run does not fail for want of somebody who watches it
                write_file(staged, json.dumps(noted))
                system.call(staged.replace, file)

    return update


def files_in(folder: Path | Url) -> tuple[int, int]:
    """Number and bytes of the safetensors files in a folder, and in those of its parts."""
    try:
        if isinstance(folder, Path):
            sizes = [path.stat().st_size for path in system.call(list, folder.rglob("*.safetensors"))]
        else:
            sizes = [size or 0 for name, size in stored_at(folder).items() if name.endswith(".safetensors")]
    except OSError as error:
        raise OutputError(f"{folder} is complete, but its files cannot be listed ({error.strerror})") from error
    return len(sizes), sum(sizes)
