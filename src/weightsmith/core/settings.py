"""How a run is carried out: one value that every job takes, and the one group of options of the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.units import parse_size

__all__ = ["DEFAULT", "Progress", "Settings", "cores"]

Progress = Callable[[int, int], None]
"""Takes (done, in all), from any thread."""

_DEVICES = ("auto", "cpu", "cuda", "cuda:0")
_FINGERPRINTS = ("quick", "full")


@dataclass(frozen=True)
class Settings:
    """How a run is carried out.  Of all this only the kind of device can change a byte of the result.

    memory       Bound on peak memory, as 4GB.
    threads      Worker threads; default: all cores.
    device       auto, cpu, cuda (all GPUs) or cuda:N.
    ray          Spread tasks over the Ray cluster at ADDRESS, or 'local'; it sees all files under the same paths.
    resume       Go on where an interrupted run of the same stopped.
    overwrite    Replace a folder that is not empty, as a whole.
    fingerprint  full: note a hash of all bytes of every input; they are read once more for that.
    progress     Called with (bytes done, bytes in all), from any thread.
    files        What else was read and must not be written over: the recipe's own files, plug-ins.

    Raises RecipeError for a value that cannot be meant.
    """

    memory: int | None = None
    threads: int | None = None
    device: Any = "auto"  # or an devices.accelerator.Accelerator
    ray: str | None = None
    resume: bool = False
    overwrite: bool = False
    fingerprint: str = "quick"
    progress: Progress | None = None
    files: tuple[Path, ...] = ()

    option: ClassVar[str] = ""
    """What stands before a field's name in messages: '--' where the values come from the command line."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(self.files))
        object.__setattr__(self, "memory", self._bytes(self.memory))
        if self.threads is not None and not hasattr(self.threads, "__index__"):
            raise RecipeError(f"{self.option}threads: expected a whole number, got {self.threads!r}")
        if self.threads is not None and self.threads < 1:
            raise RecipeError(f"{self.option}threads {self.threads} is outside [1, inf)")
        if self.progress is not None and not callable(self.progress):
            raise RecipeError(f"progress: expected a function of (done, total), got {self.progress!r}")
        if isinstance(self.device, str) and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise RecipeError(
                f"{self.option}device: unknown device {self.device!r}{did_you_mean(self.device, _DEVICES)}"
            )
        if self.fingerprint not in _FINGERPRINTS:
            raise RecipeError(
                f"{self.option}fingerprint: {self.fingerprint!r}{did_you_mean(self.fingerprint, _FINGERPRINTS)}"
            )

    def but(self, **options: Any) -> Settings:
        """The settings with some of them changed, by name."""
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                raise RecipeError(f"unknown option {name!r}{did_you_mean(name, known)}")
        return replace(self, **options) if options else self

    def taken_from(self, options: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
        """The settings with those options that are fields of them, and the other options."""
        known = {field.name for field in fields(self)}
        own = {name: value for name, value in options.items() if name in known}
        return self.but(**own), {name: value for name, value in options.items() if name not in known}

    def _bytes(self, given: int | str | None) -> int | None:
        """4000000000 or '4GB' -> bytes."""
        if given is None:
            return None
        try:
            count = parse_size(given)
        except ValueError as error:
            raise RecipeError(f"{self.option}memory: {error}") from None
        if count < 1:
            raise RecipeError(f"{self.option}memory must be at least 1 byte, for example 4GB (got {given})")
        return count


DEFAULT = Settings()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
