"""A suite as a value: its tasks, how their scores become one figure, and the methods that its paper compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weightsmith.study.grids import Written

__all__ = ["HIGHER", "LOWER", "PER_UNIT", "Direction", "Method", "Rule", "Suite", "Task", "mean_of_domains"]

Direction = Literal["higher", "lower", "per unit"]
HIGHER: Direction = "higher"
LOWER: Direction = "lower"
PER_UNIT: Direction = "per unit"

Role = Literal["test", "proxy", "guard", "held-out"]


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    metric      the key of what the evaluator returns that counts as the score
    domain      the ability that it measures; domains are averaged with equal weight
    role        test; proxy: coefficients are chosen on it and nothing else; guard: what the base could do besides, to
                see what is forgotten; held-out: what no expert was trained for
    direction   higher: is better.  lower: a rate in [0, 1] that is turned into 1 - score.  per unit: an amount such as
                bits per byte, turned into 1 / score
    harness     what the paper measures it with, in words
    split       the data it is measured on
    chance      the score of guessing, where there is one
    """

    name: str
    metric: str
    domain: str
    role: Role = "test"
    direction: Direction = HIGHER
    harness: str = ""
    split: str = "test"
    chance: float | None = None

    def up(self, score: float) -> float:
        """The score so that higher is better; ValueError for one that the direction does not take."""
        if self.direction == LOWER and not -1e-9 <= score <= 1 + 1e-9:
            raise ValueError(f"direction: lower takes a rate from 0 to 1, is {score:g}; of an amount say: per unit")
        if self.direction == PER_UNIT and score <= 0:
            raise ValueError(f"direction: per unit takes an amount above 0, is {score:g}")
        if self.direction == LOWER:
            return 1 - score
        if self.direction == PER_UNIT:
            return 1 / score
        return score


@dataclass(frozen=True)
class Method:
    """A method as the suite's paper ran it: its settings there, and the grid that they were chosen from.

    Both may name experts: they are made for the experts of a run.
    """

    paper: Callable[[Sequence[str]], Written]
    grid: Callable[[Sequence[str]], Written] | None = None
    note: str = ""


def fixed(*written: tuple[str, Mapping[str, Any]]) -> Callable[[Sequence[str]], Written]:
    """Settings that do not depend on the experts."""
    return lambda experts: written


def mean_of_domains(domains: Mapping[str, Any]) -> Any:
    """The mean, every domain counting the same; of numbers or of arrays."""
    return sum(domains.values()) / len(domains)


@dataclass(frozen=True)
class Rule:
    """How scores become one figure.

    words      the whole rule, for the reader
    against    what a domain's score is divided by: that of the expert at home there, of the base, or of the best expert
    combine    domain -> normalised score (a number, or an array of them), to the figure
    """

    words: str
    against: Literal["expert", "base", "best"] = "expert"
    combine: Callable[[Mapping[str, Any]], Any] = mean_of_domains


@dataclass(frozen=True)
class Suite:
    """A protocol of the field.  Data are the user's: nothing is bundled or downloaded.

    design    table: all experts are merged, a row per method.  scale: subsets of experts, for several bases.  wild:
              random subsets of one pool of checkpoints
    domains   the domains that tasks may have; () for any
    experts, checkpoints   what the paper merges, and what it sets beside the merges; () for any
    """

    name: str
    title: str
    source: str
    about: str
    rule: Rule
    tasks: tuple[Task, ...] = ()
    methods: Mapping[str, Method] | None = None
    design: Literal["table", "scale", "wild"] = "table"
    domains: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    subsets: int = 3
    experts: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def task(self, name: str) -> Task | None:
        """The suite's own task of that name."""
        return next((task for task in self.tasks if task.name == name), None)
