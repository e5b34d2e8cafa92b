"""Precision-weighted mean of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import NumericError
from weightsmith.core.lazy import torch
from weightsmith.core.method import Each, Method, Pass, Scope, choice, flag, number
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.ops.combine import some_weight, spread, weighted_sum
from weightsmith.ops.moments import curvature
from weightsmith.ops.reduce import block_squares

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fisher"]


@dataclass(frozen=True)
class Fisher(Method, name="fisher", needs=("fisher",), checks=(some_weight,)):
    """Average every weight by how sure each model is of it.

    Result: sum_i a_i F_i x_i / sum_i a_i F_i.
    F_i is the diagonal Fisher information (statistic "fisher", >= 0) plus a floor; a_i = w_i / (|F_i|_2 + floor)
    with the norm over all tensors that this method merges (what `exclude` or another rule takes has no part in it),
    or w_i without `normalize`.

    floor_mode  add: F + floor (the PyTorch ports); max: max(F, floor); max_target: max(F, floor) for the first
                model only (the authors' code), so that it wins where all Fishers vanish.
    A floor above the typical F turns the result into the plain mean; language models' Fishers go down to 1e-20.
    """

    paper = "Merging Models with Fisher-Weighted Averaging (Matena and Raffel, NeurIPS 2022), arXiv:2111.09832"

    weight: Each = number(1.0, "factor of each model's Fisher", low=0, each=True, smooth=True)
    normalize: bool = flag(True, "divide by the norm of each model's Fisher")
    floor: float = number(1e-6, "least Fisher information", low=0)
    floor_mode: str = choice("add", "how the floor is applied", "add", "max", "max_target")

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        # The norms go over the whole model: one number per model, not per tensor.
        return (NORMS,) if self.normalize else ()

    def merge(self, site: Site) -> Tensor:
        fishers = site.stats["fisher"] if self.normalize else _fishers(site)  # measuring has looked at them
        _tell(site, fishers)
        # a_i (F_i + floor): [n] of [*block]
        shares = [self._floored(f, i) * a for i, (f, a) in enumerate(zip(fishers, self._factors(site), strict=True))]
        total = weighted_sum(shares)
        if total.numel() and not bool(total.amin() > 0):
            raise NumericError(
                f"{site.key.name}: the Fisher information of all models is 0 somewhere, which leaves no mean; "
                f"set floor above 0 (1e-6)"
            )
        # Divided first: products of tiny Fishers and tiny weights would vanish.
        # In place where no gradient wants the share: n blocks less.
        divided = [share / total if total.requires_grad else share.div_(total) for share in shares]
        return weighted_sum(site.experts, divided).to(site.stack.dtype)

    def says(self, told: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Iterator[str]:
        mean, largest = (max((one[what] for one in told.values()), default=self.floor) for what in ("mean", "largest"))
        if mean < self.floor:
            result = "the result is the plain mean" if largest < self.floor else "the result is nearly the plain mean"
            how = f"set floor to {1e-6 * mean:.1g}, a millionth of that" if mean else "observe the models on other data"
            yield (
                f"floor = {self.floor:g} is above the Fisher information of every tensor (mean {mean:.2g} at most, "
                f"largest {largest:.2g}): {result}; {how}"
            )

    def _factors(self, site: Site) -> list[float]:
        weights = spread(self.weight, site.count)
        if self.normalize:
            norms = site.result(NORMS)
            weights = tuple(
                w / (n + self.floor) if n + self.floor > 0 else 0.0 for w, n in zip(weights, norms, strict=True)
            )
        # 1 / |F| may be huge: the largest factor becomes 1.
        top = max(weights)
        return [w / top if top > 0 else 0.0 for w in weights]  # a common factor cancels

    def _floored(self, fisher: Tensor, index: int) -> Tensor:
        if self.floor_mode == "add":
            return fisher + self.floor
        if self.floor_mode == "max" or index == 0:
            # max, or the first model of max_target
            return fisher.clamp(min=self.floor)
        return fisher


@dataclass(frozen=True)
class _Norms(Pass[list[float]]):
    """The L2 norm of each model's Fisher information."""

    def see(self, site: Site) -> State:
        return {"squares": torch.stack([block_squares(f) for f in _fishers(site)]).cpu()}

    def end(self, total: Mapping[str, Any]) -> list[float]:
        found: list[float] = total["squares"].sqrt().tolist()
        return found


NORMS = _Norms(scope=Scope.MODEL)


def _fishers(site: Site) -> tuple[Tensor, ...]:
    return curvature(site, "fisher")


def _tell(site: Site, fishers: Sequence[Tensor]) -> None:
    """How large they are, for `Fisher.says`."""
    if site.stack[0].numel():
        site.tell("mean", max(float(fisher.mean(dtype=torch.float64)) for fisher in fishers))
        site.tell("largest", max(float(fisher.amax()) for fisher in fishers))
