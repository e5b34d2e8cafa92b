"""Cases without a file: other spellings of the references' parameters, each beside its formula in float64.

Where a reference draws at random only its corner without a draw has one right result; the rest is tested by its
distribution (tests/methods).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goldens import tiny_llama
from goldens.adapters import Case, State
from weightsmith.core.keys import layer_of

__all__ = ["FORMS", "Form"]

SEED = 7


@dataclass(frozen=True)
class Form(Case):
    """A case whose right result is a formula: `make(name, base, task vectors [n, *shape])` -> the merged tensor."""

    path: Path
    name: str = ""
    given: Any = None
    models: int = 3
    make: Callable[[str, Tensor, Tensor], Tensor] = lambda name, base, deltas: base
    atol: float = 1e-6

    @property
    def label(self) -> str:
        return self.path.name

    @property
    def method(self) -> str:
        return self.name

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.given)

    @property
    def seed(self) -> int:
        return SEED

    @property
    def count(self) -> int:
        return self.models

    @property
    def expected(self) -> State:
        experts = list(self.experts.values())
        found = {}
        for name, base in self.base.items():
            deltas = torch.stack([state[name].double() - base.double() for state in experts])
            found[name] = self.make(name, base.double(), deltas)
        return found


def _form(label: str, method: str, params: Mapping[str, Any], make: Any, models: int = 3, atol: float = 1e-6) -> Form:
    return Form(Path(label), method, params, models, make, atol)


def _ramp(alpha: float, beta: float) -> Callable[[str, Tensor, Tensor], Tensor]:
    def make(name: str, base: Tensor, deltas: Tensor) -> Tensor:
        place = layer_of(name)
        depth = 0.0 if place is None else place[1] / (tiny_llama.LAYERS - 1)
        return base + (alpha + beta * depth) * deltas.sum(0)

    return make


def _summed(scaling: float) -> Callable[[str, Tensor, Tensor], Tensor]:
    return lambda name, base, deltas: base + scaling * deltas.sum(0) if base.ndim == 2 else base


def _minimiser(name: str, base: Tensor, deltas: Tensor) -> Tensor:
    """The minimiser of the interference in every direction, D C^-1: where C has full rank the start does not matter."""
    if base.ndim != 2 or name == "lm_head.weight":
        return base + deltas.mean(0)
    squares = deltas.square().sum((1, 2))
    gram = torch.stack([d.T @ d / s for d, s in zip(deltas, squares, strict=True)]).sum(0)
    target = torch.stack([d @ d.T @ d / s for d, s in zip(deltas, squares, strict=True)]).sum(0)
    assert torch.linalg.matrix_rank(gram) == len(gram), "no direction is left to the start"
    return base + target @ torch.linalg.inv(gram)


def _voted(weights: tuple[float, ...], scale: float, vote: bool, normalize: bool) -> Callable[..., Tensor]:
    def make(name: str, base: Tensor, deltas: Tensor) -> Tensor:
        given = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * base.ndim)
        votes = deltas * given
        elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
        kept = votes.sign() == elected if vote else torch.ones_like(votes)
        divisor = (given * kept).sum(0) if normalize else torch.ones_like(base)
        return base + scale * (votes * kept).sum(0) / torch.where(divisor == 0, 1.0, divisor)

    return make


def _yaml(method: str, weights: tuple[float, ...], more: str = "", each: str = "density: 1.0") -> dict[str, str]:
    lines = [f"  - model: expert{i}\n    parameters: {{weight: {w}, {each}}}" for i, w in enumerate(weights)]
    text = "\n".join([f"merge_method: {method}", "base_model: base", "models:", *lines, more, "dtype: float32\n"])
    return {"yaml": text}


_UNFILTERED = {"init_mode": "sum", "scaling": 1.0, "exclude": []}
_WEIGHTS = (0.4, 0.3, 0.2)

FORMS: tuple[Form, ...] = (
    _form("lines-edit", "lines", {"mode": "edit", "alpha": 0.1, "beta": 0.9, "num_blocks": 3}, _ramp(0.1, 0.9), 1),
    _form("lines-edit-auto-beta", "lines", {"mode": "edit", "alpha": 0.3}, _ramp(0.3, 0.7), 1),
    _form("knots-tv-sum", "knots_tv", {"topK": 100, "scaling": 0.4, "merging_type": "sum"}, _summed(0.4), atol=1e-5),
    _form("knots-tv-mean", "knots_tv", {"merge_method": "tv"}, _summed(1 / 3), atol=1e-5),
    _form("swudi-none", "swudi", {**_UNFILTERED, "filter_type": "none", "truncate_rank_ratio": None},
          _minimiser, atol=5e-5),
    _form("swudi-no-end", "swudi", {"exp_time": None, "truncate_rank_ratio": 1.0, "init_mode": "zero"},
          _minimiser, atol=5e-5),
    _form("aswudi-none", "aswudi", {**_UNFILTERED, "filter_type": "none", "auto_rank_method": "none"},
          _minimiser, atol=5e-5),
    _form("della", "mergekit:della", _yaml("della", _WEIGHTS, "parameters: {lambda: 0.9}"),
          _voted(_WEIGHTS, 0.9, vote=True, normalize=True)),
    _form("della-linear", "mergekit:della_linear", _yaml("della_linear", _WEIGHTS, each="density: 1.0, epsilon: 0.1"),
          _voted(_WEIGHTS, 1.0, vote=False, normalize=False)),
    _form("ties-negative", "mergekit:ties", _yaml("ties", (0.4, -0.3, 0.2)),
          _voted((0.4, -0.3, 0.2), 1.0, vote=True, normalize=True), atol=2e-5),
)  # fmt: skip
"""Every spelling beside its right result."""
