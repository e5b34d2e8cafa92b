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
        if wrong := self.wrong(given):
            raise RecipeError(*wrong)
        if len(self.goals) > 1 and not self.fronts:
            raise RecipeError(
                f"sampler {self.name} searches for one number, but there are {len(self.goals)} goals: "
                f"{', '.join(self.goals)}; add weights, or take nsga2"
            )
        self.given = {**self.options, **given}
        self.begin()

    @classmethod
    def wrong(cls, given: Mapping[str, Any]) -> list[str]:
        """All that is wrong with options, whatever the space and the budget."""
        unknown = [f"unknown option {name!r}{did_you_mean(str(name), cls.options)}" for name in given
                   if name not in cls.options]  # fmt: skip
        wanted = {name: cls.wanted(name, value) for name, value in given.items() if name in cls.options}
        bad = [f"{name} = {given[name]!r}; expected {what}" for name, what in wanted.items() if what is not None]
        return [f"sampler {cls.name}: {text}" for text in (*unknown, *bad)]

    @classmethod
    def wanted(cls, option: str, value: Any) -> str | None:
        """What an option should be where it is something else."""
        default = cls.options[option]
        if type(default) is int:
            return None if type(value) is int and value >= 1 else "a whole number from 1 on"
        if type(default) is float:
            return None if type(value) in (int, float) and 0 < value < math.inf else "a number above 0"
        return None

    def begin(self) -> None:  # noqa: B027  (most have nothing to prepare)
        """Make ready for the first question."""

    @property
    def most(self) -> int:
        """Candidates that it asks for at most."""
        return self.budget

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

    @property
    def most(self) -> int:
        return self.count

    def point(self, number: int) -> dict[str, Any] | None:
        if number >= self.count:
            return None
        chosen = next(itertools.islice(itertools.product(*self.axes), number, None))
        return {gene.name: value for gene, value in zip(self.space.genes, chosen, strict=True)}
