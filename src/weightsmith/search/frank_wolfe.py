"""Frank-Wolfe through a pool of checkpoints: step towards the one that the loss gradient points away from.

Source: "FW-Merging: Scaling Model Merging with Frank-Wolfe Optimization" (Chen et al., ICCV 2025), its hard variant.
Left out: the authors' layer mode replaces a tensor by zeros where no cosine is negative; here it does not move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.errors import WeightsmithError
from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GRANULARITIES", "INITIAL", "SCORES", "FrankWolfe", "Step"]

GRANULARITIES = ("task", "layer")
SCORES = ("cosine", "inner", "inner_delta")
INITIAL = "initial"
"""The vertex that the start is: choosing it lets the method go back."""

Reader = Callable[[str], "Tensor"]
"""Tensor name -> weights.  A vertex is read one tensor at a time, so that no memory depends on the pool."""


@dataclass(frozen=True, eq=False)
class Step:
    """One iteration.

    weights  after it, by tensor name
    chosen   tensor -> the vertex that it moved towards; None: it did not move
    gap      <gradient, weights before - vertex>: 0 at a minimum over the pool's convex hull
    size     share of the way to the vertex
    """

    weights: Mapping[str, Tensor]
    chosen: Mapping[str, str | None]
    gap: float
    size: float


@dataclass(frozen=True)
class FrankWolfe:
    """Options of the descent.

    granularity  task: one vertex for all tensors; layer: one for each tensor
    score        cosine: of gradient and vertex weights, per tensor (the reference); inner: <gradient, vertex>, the
                 textbook's; inner_delta: <gradient, vertex - weights>, the same choice without cancellation
    step_size    factor of 2 / (t + 2)
    scaling      coefficient of the local merge (task arithmetic of the one vertex around the current weights)
    iterations   at most; tolerance: end where the gap is below it
    """

    granularity: str = "task"
    score: str = "inner_delta"
    step_size: float = 0.1
    scaling: float = 0.3
    iterations: int = 10
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        for name, given, known in (("granularity", self.granularity, GRANULARITIES), ("score", self.score, SCORES)):
            if given not in known:
                raise WeightsmithError(f"{name} = {given!r}; expected one of {', '.join(known)}")
        for name in ("step_size", "scaling"):
            if not 0 < getattr(self, name) < math.inf:
                raise WeightsmithError(f"{name} = {getattr(self, name)!r}; expected a number above 0")
        if self.iterations < 1:
            raise WeightsmithError(f"iterations = {self.iterations}; expected at least 1")

    def run(
        self,
        start: Mapping[str, Tensor],
        pool: Mapping[str, Reader],
        gradient: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    ) -> Iterator[Step]:
        """Descend from `start`; one `Step` an iteration.

        pool      name -> reader of its tensors; `start` is added to it as 'initial'
        gradient  of the loss at some weights, by tensor name; tensors without one (buffers, frozen ones) stay

        Of equal scores the first vertex in the pool's order wins.  Raises WeightsmithError for an empty pool.
        """
        if not pool:
            raise WeightsmithError("the pool is empty; name at least one checkpoint")
        vertices: dict[str, Reader] = {**pool, INITIAL: start.__getitem__}
        weights = dict(start)
        for t in range(self.iterations):
            slope = {name: g for name, g in gradient(weights).items() if name in weights and bool((g != 0).any())}
            chosen = self.choose({v: self._scores(read, slope, weights) for v, read in vertices.items()})
            size = self.scaling * self.step_size * 2 / (t + 2)
            gap, after = 0.0, dict(weights)
            for name, vertex in chosen.items():
                away = vertices[vertex](name) - weights[name]
                gap -= float((slope[name].double() * away.double()).sum())
                after[name] = weights[name] + size * away
            yield Step(after, {name: chosen.get(name) for name in weights}, gap, size)
            weights = after
            if gap < self.tolerance:
                return

    def choose(self, scores: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
        """Tensor -> vertex of the least score; scores: vertex -> tensor -> score."""
        names = next(iter(scores.values()))
        if self.granularity == "task":
            best = min(scores, key=lambda vertex: math.fsum(scores[vertex].values()))
            return dict.fromkeys(names, best)
        return {name: min(scores, key=lambda vertex: scores[vertex][name]) for name in names}

    def _scores(self, read: Reader, slope: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: self.of(g, read(name), weights[name]) for name, g in slope.items()}

    def of(self, gradient: Tensor, vertex: Tensor, weights: Tensor) -> float:
        """The score of one tensor, in float64: scores of fine-tuned models differ by parts in a million."""
        g, v = gradient.double(), vertex.double()
        if self.score == "inner_delta":
            v = v - weights.double()
        inner = float((g * v).sum())
        if self.score != "cosine":
            return inner
        norms = float(torch.linalg.vector_norm(g) * torch.linalg.vector_norm(v))
        return inner / norms if norms > 0 else 0.0
