"""Mean of checkpoints weighted by how far each moved from their common start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Method, Pass, Scope, choice, number
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.ops.combine import weighted_sum
from weightsmith.ops.reduce import block_sizes, block_squares

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Codiemb"]


@dataclass(frozen=True)
class Codiemb(Method, name="codiemb", needs=(BASE,)):
    """Average checkpoints of one run, each tensor by how far it moved from the start.

    w_k = d_k^power / sum_j d_j^power, with d_k the deviation of checkpoint k's tensor from the base; 1 / K where
    all are 0.  Result: sum_k w_k x_k = base + sum_k w_k delta_k.  With `scope: element` d_k is |delta_k| entry by
    entry, for power 1: base + sum_k |delta_k| delta_k / sum_k |delta_k|.

    score      l1_mean: mean |delta|; l2: Euclidean norm; sq: its square
    normalize  model: d_k is divided by the same of checkpoint k's whole change, so that one that was trained longer
               does not lead everywhere

    A reconstruction from the paper's words: neither its formula nor its code for this step was published.
    """

    paper = "CoDiEmb (Zhang et al., 2025), arXiv:2508.11442, its delta-guided fusion; reconstruction, not verified"

    scope: str = choice("tensor", "what has a weight of its own", "tensor", "element")
    score: str = choice("l1_mean", "how deviation is measured", "l1_mean", "l2", "sq")
    power: float = number(1.0, "exponent of the deviations; 0: the plain mean", low=0)
    normalize: str = choice("none", "what deviations are divided by", "none", "model")

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        found: tuple[Pass[Any], ...] = (_Moved(self.score),) if self.scope == "tensor" else ()
        return (*found, _Moved(self.score, scope=Scope.MODEL)) if self.normalize == "model" else found

    def merge(self, site: Site) -> Tensor:
        assert site.base is not None
        units = [1.0] * site.count
        if self.normalize == "model":
            units = site.result(self.passes(site.count)[-1])
        if self.scope == "element":
            return site.base + _by_entry(site.deltas, units, self.power)
        moved = site.result(_Moved(self.score))
        shares = _shares([m / u if u > 0 else 0.0 for m, u in zip(moved, units, strict=True)], self.power)
        return site.base + weighted_sum(site.deltas, tuple(shares))


def _shares(moved: list[float], power: float) -> list[float]:
    """d^power over their sum; equal where nothing moved.  Divided by the largest first: powers do not overflow."""
    top = max(moved)
    powers = [(m / top) ** power if top > 0 else 1.0 for m in moved]
    return [p / sum(powers) for p in powers]


def _by_entry(deltas: Tensor, units: list[float], power: float) -> Tensor:
    """sum_k s_k delta_k / sum_k s_k, s_k = (|delta_k| / unit_k / the largest of these)^power; one model at a time."""
    scales = [1 / unit if unit > 0 else 0.0 for unit in units]
    top = deltas[0].abs() * scales[0]
    for i in range(1, len(deltas)):
        top = torch.maximum(top, deltas[i].abs().mul_(scales[i]))
    top = top.clamp_(min=1e-38)  # where nothing moved all deltas are 0, and so is their mean
    total, shares = torch.zeros_like(top), torch.zeros_like(top)
    for i in range(len(deltas)):
        share = deltas[i].abs().mul_(scales[i]).div_(top).pow_(power)
        shares.add_(share)
        total.add_(share.mul_(deltas[i]))
    return total.div_(shares.clamp_(min=1e-38))


@dataclass(frozen=True)
class _Moved(Pass[list[float]]):
    """How far each checkpoint moved, over a tensor or the whole model."""

    score: str

    def see(self, site: Site) -> State:
        size = block_sizes if self.score == "l1_mean" else block_squares
        count = torch.tensor(float(site.stack[0].numel()), dtype=torch.float64)
        return {"moved": torch.stack([size(d).cpu() for d in site.deltas]), "count": count}

    def end(self, total: Mapping[str, Any]) -> list[float]:
        found = total["moved"] / max(float(total["count"]), 1.0) if self.score == "l1_mean" else total["moved"]
        return (found.sqrt() if self.score == "l2" else found).tolist()  # type: ignore[no-any-return]
