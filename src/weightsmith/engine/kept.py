"""What has been read of a tensor and will be wanted again: by its next pass, or by the next variant of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.io.read.source import Source
from weightsmith.kernels.stored import Stored

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Kept"]

Place = tuple[str, int, int]
"""A block: tensor, first row, row behind the last."""
Values = tuple["Tensor", "Tensor | None", tuple[tuple["Tensor", "Tensor"], ...]]
"""Stack, base and factors of a site."""


class Kept:
    """Belongs to the tasks that one thread works on together; they ask for blocks in nearly the same order.

    What is asked for again after its block has gone is read again: a miss costs time, never a byte.

    shared  several tasks ask for the same: worth keeping what one alone would read twice rather than hold
    """

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self.stored: dict[tuple[int, str, int, int], Stored] = {}
        self._rows: dict[Place, dict[int, np.ndarray]] = {}
        self._values: dict[Place, dict[tuple[Any, ...], Values]] = {}
        self._answers: dict[Any, Any] = {}
        self._made: dict[Any, Tensor] = {}
        self._asked: dict[Any, tuple[list[Any], list[Any]]] = {}

    def rows(self, source: Source, place: Place) -> np.ndarray:
        """The latest block of one source as stored, `source.bits(*place)`."""
        if place not in self._rows:
            self._rows.clear()
        here = self._rows.setdefault(place, {})
        if id(source) not in here:
            here[id(source)] = source.bits(*place)
        return here[id(source)]

    def once(
        self, question: Any, work: Callable[[], Generator[None, None, Any]]
    ) -> Generator[None, None, tuple[Any, bool]]:
        """(the result of `work`, not None; whether it was done now): the first who asks does it, others wait."""
        if question not in self._answers:
            self._answers[question] = None
            self._answers[question] = yield from work()
            return self._answers[question], True
        while self._answers[question] is None:
            yield
        return self._answers[question], False

    def made(self, place: Any, question: Any, make: Callable[[], Tensor]) -> Tensor:
        """What the first who asked this at this place has made; kept to the end."""
        if (place, question) not in self._made:
            self._made[place, question] = make()
        return self._made[place, question]

    def jointly(
        self, question: Any, wanted: Any, work: Callable[[Sequence[Any]], Generator[None, None, Sequence[Any]]]
    ) -> Generator[None, None, Any]:
        """The result for `wanted` of `work`, which takes what all want who ask this in one turn, and answers each."""
        asked, found = self._asked.setdefault(question, ([], []))
        place = len(asked)
        asked.append(wanted)
        yield  # now the others ask
        if place == 0:
            del self._asked[question]  # who comes later asks anew
            found += yield from work(asked)
        while not found:
            yield
        return found[place]

    def values(self, place: Place, which: tuple[Any, ...], make: Callable[[], Values]) -> Values:
        """The latest block in float32; `which` tells apart what is read otherwise (inputs, factors or not)."""
        if place not in self._values:
            self._values.clear()
        here = self._values.setdefault(place, {})
        if which not in here:
            here[which] = make()
        return here[which]
