"""One whole process: how long it took, what it used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BenchError", "Usage", "forget_cached", "measure", "plain_environment"]

_HERE = Path(__file__).parent
_LAUNCH = _HERE / "launch.py"
_TRIES, _PAUSE, _LOOKS = 10, 0.2, 8


class BenchError(Exception):
    """A run that failed, or two sides that computed different things."""


@dataclass(frozen=True)
class Usage:
    """What one process used.

    wall  seconds from its start to its end
    cpu   user + system seconds, children included
    rss   peak resident bytes of the process, or of its largest child if that was larger
    load  the machine's load average (1 minute) when it started
    """

    wall: float
    cpu: float
    rss: int
    load: float


def measure(command: Sequence[str], env: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end.  Raises BenchError with the end of its output if it fails."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report.json"), Path(folder, "log.txt")
        launch = [sys.executable, "-I", "-S", str(_LAUNCH), str(report), str(log), *command]
        subprocess.run(launch, env=dict(env or plain_environment()), check=True)
        found = json.loads(report.read_text())
        if found.pop("code") != 0:
            text = log.read_text(errors="replace").strip()[-2000:]
            raise BenchError(f"{' '.join(command)} failed:\n{text}")
    return Usage(**found, load=load)


def plain_environment() -> dict[str, str]:
    """This process's environment without what was set for running tests; nothing is looked up on the hub."""
    left_out = ("OMP_", "MKL_", "PYTHON", "WEIGHTSMITH_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def forget_cached(files: Iterable[Path]) -> bool:
    """Drop files from the page cache; returns whether they are gone from it.

    Pages that are just being written or read stay for the moment, so it is tried for a while.
    """
    os.sync()
    left = list(files)
    for _ in range(_TRIES):
        left = [path for path in left if not _forgotten(path)]
        if not left:
            return True
        time.sleep(_PAUSE)
    return False


def _forgotten(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return not any(_cached(descriptor, size * i // _LOOKS) for i in range(_LOOKS))
    finally:
        os.close(descriptor)


def _cached(descriptor: int, place: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
