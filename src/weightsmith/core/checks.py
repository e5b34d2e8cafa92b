"""What is asked of a stage before a run: checks as values, and what they find.

A check is a function of a stage and of the case it is used in.  A stage names those it shares with others in its
header (`checks=(at_least(2), dims(2))`) and writes what only it knows as `Stage.check`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from weightsmith.core.keys import Key
from weightsmith.core.problem import Code

__all__ = ["Case", "Check", "Count", "Dims", "Level", "Verdict", "at_least", "at_most", "by_depth", "dims", "exactly",
           "leave", "refuse", "remark", "remark_here", "small_changes", "with_base"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What a stage is about to be used on.

    count     number of experts
    has_base  whether there is a base
    key       the tensor; None: the question is about the recipe
    blocks    what is wrong with the block numbers in the tensors' names; '' if nothing is
    change    (mean |delta| / mean |weight|, 99% quantile of |delta|) of an expert, in a sample of its weights
    """

    count: int
    has_base: bool = True
    key: Key | None = None
    blocks: str = ""
    change: tuple[float, float] | None = None


class Level(Enum):
    """What follows from a verdict."""

    REFUSE = "refuse"  # the recipe cannot be run
    REMARK = "remark"  # it can, but the user should know
    HERE = "here"  # so of one tensor; a plan has one line for all tensors with the same text
    LEAVE = "leave"  # the stage does not cover this kind of tensors, see `Traits.otherwise`


class Verdict(NamedTuple):
    """What a check found.  text: after the stage's name and a colon; of LEAVE the kind of tensors, a plural."""

    level: Level
    text: str
    code: Code = Code.STAGE


Check = Callable[[Any, Case], Iterable[Verdict]]
"""(stage, case) -> verdicts."""


def refuse(text: str | None, code: Code = Code.STAGE) -> tuple[Verdict, ...]:
    """The recipe cannot be run; None or '': it can."""
    return (Verdict(Level.REFUSE, text, code),) if text else ()


def remark(text: str | None) -> tuple[Verdict, ...]:
    """The user should know; None or '': nothing to say."""
    return (Verdict(Level.REMARK, text),) if text else ()


def remark_here(text: str | None) -> tuple[Verdict, ...]:
    """The user should know of this tensor."""
    return (Verdict(Level.HERE, text),) if text else ()


def leave(kind: str | None) -> tuple[Verdict, ...]:
    """The stage does not cover this kind of tensors."""
    return (Verdict(Level.LEAVE, kind),) if kind else ()


# --- checks that several stages share -----------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """So many experts."""

    low: int = 1
    high: int | None = None

    def __call__(self, stage: Any, case: Case) -> Iterable[Verdict]:
        if self.low <= case.count <= (self.high or case.count):
            return ()
        words = "" if self.low == self.high else "at least " if case.count < self.low else "at most "
        wanted = self.low if case.count < self.low else self.high
        return refuse(f"takes {words}{wanted} model{'s' * (wanted != 1)}, not {case.count}", Code.COUNT)


def at_least(count: int) -> Count:
    return Count(low=count)


def at_most(count: int) -> Count:
    return Count(high=count)


def exactly(count: int) -> Count:
    return Count(count, count)


@dataclass(frozen=True)
class Dims:
    """Tensors of so many dimensions; other tensors go elsewhere."""

    low: int
    high: int

    def __call__(self, stage: Any, case: Case) -> Iterable[Verdict]:
        found = self.low if case.key is None else len(case.key.shape)
        return leave("" if self.low <= found <= self.high else f"{found}-D tensors")


def dims(low: int, high: int | None = None) -> Dims:
    """From `low` to `high` dimensions; exactly `low` without it."""
    return Dims(low, low if high is None else high)


def with_base(stage: Any, case: Case) -> Iterable[Verdict]:
    """There is a base, though the stage does not work on task vectors."""
    return refuse(None if case.has_base else "needs a base model; add base to the recipe")


def by_depth(stage: Any, case: Case) -> Iterable[Verdict]:
    """The tensors' names show the blocks that the stage goes by."""
    return refuse(case.blocks and f"works by depth, but {case.blocks}", Code.DEPTH)


RATIO, LARGE = 0.05, 0.01
"""Mean |delta| / mean |weight|, and 99% quantile of |delta|, above which random drops do harm (arXiv:2311.03099: most
changes of fine-tuned models are within 0.002; those of models that were pre-trained further, about 0.03, fail)."""


def small_changes(stage: Any, case: Case) -> Iterable[Verdict]:
    """The experts are close to the base."""
    if case.change is None or (case.change[0] <= RATIO and case.change[1] <= LARGE):
        return ()
    return remark(
        f"by {case.change[0]:.2g} of the base's weights on average, 1% of them by more than {case.change[1]:.2g} (in a "
        "sample); raise density, or trim with ties"
    )
