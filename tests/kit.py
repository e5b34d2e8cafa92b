"""What the tests of every part share: random tensors, parameters that methods need, how many models they take, bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.checks import Case, Level
from weightsmith.core.method import Stage, registered
from weightsmith.core.problem import Problem

__all__ = ["GIVEN", "count_for", "noise", "refusal", "remarks", "same_bits", "stage_of", "state", "texts"]

GIVEN: Mapping[str, Mapping[str, Any]] = {"mwa": {"value": 2.0}}
"""Parameters whose default is read from files, which small models do not have: method -> name -> value."""


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for a seed in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state(shapes: Mapping[str, tuple[int, ...]], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """A model of normal numbers: one stream for all tensors, in order."""
    draw = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def stage_of(name: str, **parameters: Any) -> Stage:
    """A registered stage with its defaults, and what it needs."""
    return registered()[name](**{**GIVEN.get(name, {}), **parameters})


def count_for(stage: Stage, wanted: int = 3) -> int:
    """The number of experts next to `wanted` that the stage takes beside a base."""
    for count in (*range(wanted, 0, -1), wanted + 1):
        if refusal(stage, count) is None:
            return count
    raise AssertionError(f"{stage.name} takes no number of experts up to {wanted}")


def refusal(stage: Stage, count: int, has_base: bool = True) -> str | None:
    """Why a stage cannot be used on so many experts."""
    return stage.refusal(Case(count, has_base))


def remarks(stage: Stage, count: int, has_base: bool = True) -> list[str]:
    """What the user should know of using it on so many."""
    return [text for level, text, _ in stage.verdicts(Case(count, has_base)) if level is Level.REMARK]


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two models have the same tensors in the same order, to the bit: -0.0 is not 0.0, and a NaN is itself."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(bits[a[n].itemsize]), b[n].view(bits[b[n].itemsize]))
        for n in a
    )


def texts(problems: Iterable[Problem]) -> list[str]:
    """What problems and warnings say."""
    return [problem.text for problem in problems]
