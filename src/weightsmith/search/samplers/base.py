"""What a sampler is, and those that need nothing but a seed."""

from __future__ import annotations

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.search.genes import Point
from weightsmith.search.space import Space

__all__ = ["Grid", "Random", "Sampler", "Values", "seed_of"]

Values = Sequence[float] | None
"""What a candidate reached, one number for each goal, more is better; None: nothing is known to compare it with."""


def seed_of(*parts: object) -> int:
    """32 bits from anything that can be printed: the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class Sampler(ABC):
    """Asks for candidates and is told what they reached, generation by generation.

    Everything that the next question depends on is in `state`, as JSON holds it: a run that is killed and taken up
    again asks for the same candidates.

    name     how a file calls it
    options  option -> its default
    batch    candidates of a generation, where the file does not say
    fronts   whether it takes several goals
    punished  whether it is told of a failure as of the worst score so far, or not at all
    identity  what it asks depends on, beside the space, its options and what it was told
    signs    of each goal: -1 where less is better and its negative is told
    promise  what resuming gives
    """

    name: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    batch: int = 8
    fronts: ClassVar[bool] = True
    punished: ClassVar[bool] = True
    identity: Any = None
    signs: Sequence[float] = ()
    promise: ClassVar[str] = "bit for bit"

    def __init__(
        self, space: Space, goals: Sequence[str], seed: int, given: Mapping[str, Any], folder: Path, budget: int
    ) -> None:
        self.space, self.goals, self.seed, self.folder, self.budget = space, tuple(goals), seed, folder, budget
        for option in given:
            if option not in self.options:
                raise RecipeError(f"sampler {self.name}: unknown option {option!r}{did_you_mean(option, self.options)}")
        for option, value in given.items():
            self._check(option, value)
        if len(self.goals) > 1 and not self.fronts:
            raise RecipeError(
                f"sampler {self.name} searches for one number, but there are {len(self.goals)} goals: "
                f"{', '.join(self.goals)}; add weights, or take nsga2"
            )
        self.given = {**self.options, **given}
        self.begin()

    def _check(self, option: str, value: Any) -> None:
        default = self.options[option]
        whole = isinstance(default, int) and not isinstance(default, bool)
        good = type(value) is int and value >= 1 if whole else type(value) in (int, float) and value > 0
        if isinstance(default, (int, float)) and not isinstance(default, bool) and not good:
            kind = "a whole number from 1 on" if whole else "a number above 0"
            raise RecipeError(f"sampler {self.name}: {option} = {value!r}; expected {kind}")

    def begin(self) -> None:  # noqa: B027  (most have nothing to prepare)
        """Make ready for the first question."""

    def notes(self) -> list[str]:
        """What is to be said at the end."""
        return []

    @abstractmethod
    def ask(self, count: int) -> list[dict[str, Any]]:
        """At most so many points; none when there is nothing left to ask."""

    @abstractmethod
    def tell(self, points: Sequence[Point], values: Sequence[Values]) -> None:
        """Take what the points of the last question reached."""

    @abstractmethod
    def state(self) -> Any:
        """All that the next question depends on; after `tell`."""

    @abstractmethod
    def restore(self, state: Any) -> None:
        """Be as when `state` was taken."""


class _Counting(Sampler):
    """Point number i depends on i alone."""

    def begin(self) -> None:
        self.asked = 0

    def ask(self, count: int) -> list[dict[str, Any]]:
        found = [self.point(self.asked + i) for i in range(count)]
        return [point for point in found if point is not None]

    @abstractmethod
    def point(self, number: int) -> dict[str, Any] | None:
        """The point of a number, None behind the last."""

    def tell(self, points: Sequence[Point], values: Sequence[Values]) -> None:
        self.asked += len(points)

    def state(self) -> Any:
        return {"asked": self.asked}

    def restore(self, state: Any) -> None:
        self.asked = int(state["asked"])


class Random(_Counting):
    """Evenly at random."""

    name = "random"

    def point(self, number: int) -> dict[str, Any] | None:
        draw = np.random.default_rng([self.seed, number])
        return self.space.at(draw.random(len(self.space.genes)).tolist())


class Grid(_Counting):
    """Every combination of evenly spaced values."""

    name = "grid"
    options: ClassVar[Mapping[str, Any]] = {"steps": 5}

    def begin(self) -> None:
        super().begin()
        self.axes = [gene.grid(self.given["steps"]) for gene in self.space.genes]
        self.count = math.prod(len(axis) for axis in self.axes)
        if self.count > self.budget:
            shape = " x ".join(str(len(axis)) for axis in self.axes)
            raise RecipeError(
                f"sampler grid: {shape} = {self.count} points, but evaluations = {self.budget}; raise "
                "evaluations, or lower sampler.grid.steps"
            )

    def point(self, number: int) -> dict[str, Any] | None:
        if number >= self.count:
            return None
        chosen = next(itertools.islice(itertools.product(*self.axes), number, None))
        return {gene.name: value for gene, value in zip(self.space.genes, chosen, strict=True)}
