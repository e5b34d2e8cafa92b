"""The merges that are measured: the same one in the words of both programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["MERGES", "Merge"]

WEIGHTS = (0.5, 0.3, 0.4)
"""Of the experts, repeated as needed: unlike, so that a mixed-up order would show."""


@dataclass(frozen=True)
class Merge:
    """One merge.

    name      as mergekit calls it
    method    weightsmith's stages
    theirs    mergekit's parameters for the whole merge
    density   mergekit's share of kept entries per model, if it has one
    base      whether the base is read
    most      most experts it takes
    random    whether entries are drawn at random (then only what is not random can be compared)
    tied      whether entries are ranked (then equals at the cut may fall on either side)
    close     largest difference between two float32 evaluations, relative to the tensor's largest value
    """

    name: str
    method: Sequence[Mapping[str, Any]]
    theirs: Mapping[str, Any] = field(default_factory=dict)
    density: float | None = None
    base: bool = True
    most: int | None = None
    random: bool = False
    tied: bool = False
    close: float = 2e-6

    def inputs(self, base: Path, experts: Sequence[Path]) -> list[Path]:
        """The folders that it reads."""
        return [base] * self.base + list(experts[: self.most])

    def recipe(self, path: Path, base: Path, experts: Sequence[Path]) -> Path:
        """Write weightsmith's recipe (JSON is YAML too)."""
        weighted = self.name != "slerp"
        found: dict[str, Any] = {"base": str(base)} if self.base else {}
        found["models"] = {
            folder.name: {"model": str(folder)} | ({"weight": weight} if weighted else {})
            for folder, weight in zip(experts[: self.most], self._weights(experts), strict=False)
        }
        return _write(path, {**found, "method": list(self.method)})

    def config(self, path: Path, base: Path, experts: Sequence[Path], dtype: str = "bfloat16") -> Path:
        """Write mergekit's configuration; `dtype` is what it calculates in and stores."""
        found: dict[str, Any] = {"merge_method": self.name, "dtype": dtype, "parameters": dict(self.theirs)}
        if self.base:
            found["base_model"] = str(base)
        models: list[dict[str, Any]] = [{"model": str(base)}] if self.name == "slerp" else []
        for folder, weight in zip(experts[: self.most], self._weights(experts), strict=False):
            own = {} if self.density is None else {"density": self.density}
            models.append({"model": str(folder), "parameters": {"weight": weight, **own}})
        return _write(path, {**found, "models": models})

    @staticmethod
    def _weights(experts: Sequence[Path]) -> list[float]:
        return [WEIGHTS[i % len(WEIGHTS)] for i in range(len(experts))]


def _write(path: Path, value: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))
    return path


def _dare_ties(density: float) -> Merge:
    """mergekit's dare_ties: its L1 rescaling, the sum (not the mean) of what agrees with the elected sign."""
    voted = {"density": 1.0, "scope": "tensor", "zero_sign": "plus", "aggregate": "sum"}
    return Merge(
        "dare_ties",
        [{"dare": {"density": density, "rescale_rule": "l1"}}, {"ties": voted}],
        {"normalize": False, "rescale": True},
        density=density,
        random=density < 1,
    )


MERGES: Mapping[str, Merge] = {
    merge.name: merge
    for merge in (
        Merge("linear", [{"linear": {"normalize": True}}], {"normalize": True}, base=False),
        Merge("task_arithmetic", [{"task_arithmetic": {"lambda": 0.7}}], {"lambda": 0.7}),
        # mergekit takes the angle in float32, which costs it two digits; weightsmith in float64.
        Merge("slerp", [{"slerp": {"t": 0.4}}], {"t": 0.4}, most=1, close=2e-5),
        Merge(
            "ties",
            [{"ties": {"density": 0.5, "scope": "tensor", "zero_sign": "plus", "aggregate": "mean"}}],
            {"normalize": True},
            density=0.5,
            tied=True,
        ),
        _dare_ties(0.5),
    )
}

UNDRAWN = _dare_ties(1.0)
"""dare_ties with nothing dropped: the part of it that both programs must agree on."""
