"""What inputs say of themselves for methods that ask: logs of trainers, notes of statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.io.read.source import Source
from weightsmith.io.read.trainer import logged, step_of

__all__ = ["KINDS", "TrainerLogs", "common_notes"]

KINDS = ("steps", "loss", "loss since", "eval_loss", "eval_loss since")
"""The step; the last loss logged up to it; the mean of those logged since the checkpoint before."""


class TrainerLogs(Mapping[str, tuple[Callable[[], float], ...]]):
    """Kind -> for each expert what reads its value.  Nothing is read before that, and nothing twice.

    Reading raises SourceError, naming the expert, where it is no checkpoint or nothing is logged for it.
    """

    def __init__(self, experts: Mapping[str, Source]) -> None:
        self._experts = experts
        self._read = cache(self._value)

    def __getitem__(self, kind: str) -> tuple[Callable[[], float], ...]:
        if kind not in KINDS:
            raise KeyError(kind)
        return tuple(partial(self._read, kind, name) for name in self._experts)

    def __iter__(self) -> Iterator[str]:
        return iter(KINDS)

    def __len__(self) -> int:
        return len(KINDS)

    def _value(self, kind: str, name: str) -> float:
        try:
            folder = self._folder(name)
            if kind == "steps":
                return float(step_of(folder))
            what, _, since = kind.partition(" ")
            return logged(folder, what, self._before(name) if since else None)
        except SourceError as error:
            raise SourceError(f"{name}: {error}") from None

    def _folder(self, name: str) -> Path:
        origin = self._experts[name].origin
        if (folder := origin.checkpoint) is None:
            raise SourceError(f"{origin.label} is no checkpoint's folder and has no log; give its value instead")
        return folder

    def _before(self, name: str) -> int:
        """The step of the checkpoint before, 0 if there is none."""
        here = step_of(self._folder(name))
        return max((step for other in self._experts if (step := step_of(self._folder(other))) < here), default=0)


def common_notes(sources: Iterable[Source]) -> dict[str, Any]:
    """What the statistics of all models say alike about themselves."""
    first, *others = [dict(source.origin.metadata) for source in sources]
    return {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
