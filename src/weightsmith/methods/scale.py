"""Multiply task vectors by factors: one, or several for the parts of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.kernel import Times
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Filter, choice, number
from weightsmith.core.parameter import Vector
from weightsmith.core.site import Site
from weightsmith.ops.noise import uniform_bits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Scale"]


@dataclass(frozen=True)
class Scale(Filter, name="scale", needs=(BASE,)):
    """Multiply every model's task vector by a factor, or the parts of a tensor by a factor each.

    A factor is a number, or several: c numbers from a file of coefficients (`factor: {file: coefficients.safetensors}`)
    belong to c parts of the tensor.

    chunk  consecutive entries in row-major order, ceil(numel / c) each, the last fewer, as `torch.chunk` cuts them; as
           many factors as entries: each its own
    group  every entry belongs to one of the c groups at random, by the noise of `ops.noise`, keyed by the recipe's seed
           and the tensor's name.  The authors of aTLAS share a mask between tensors of one shape; here each tensor has
           its own
    """

    paper = "Expert Merging++ (2025), arXiv:2509.25712; aTLAS (NeurIPS 2024), arXiv:2407.02880"

    factor: Any = number(1.0, "factor of each task vector", each=True, smooth=True, several=True)
    by: str = choice("chunk", "what several factors belong to", "chunk", "group")

    def fused(self, count: int) -> Times | None:
        factors = self.factor if isinstance(self.factor, tuple) else (self.factor,) * count
        return None if any(isinstance(one, Vector) for one in factors) else Times(factors)

    def apply(self, site: Site) -> Site:
        factors = self.factor if isinstance(self.factor, tuple) else (self.factor,) * site.count
        return site.with_deltas(
            torch.stack([delta * self._on(site, factor) for delta, factor in zip(site.deltas, factors, strict=True)])
        )

    def _on(self, site: Site, factor: Any) -> Any:
        """The factor of every entry of the block; one number where there is one."""
        values = factor.tensor if isinstance(factor, Vector) else factor
        if isinstance(values, (int, float)) or not values.ndim:
            return values
        values = values.to(site.stack.device, site.stack.dtype)
        size = site.stack[0].numel()
        if len(values) == 1:
            return values[0]
        if len(values) == site.key.numel and self.by == "chunk":
            return values[site.offset : site.offset + size].reshape(site.block_shape)
        return values[self._parts(site, len(values), size)].reshape(site.block_shape)

    def _parts(self, site: Site, count: int, size: int) -> Tensor:
        """Which part each entry of the block belongs to: int64 [size]."""
        if self.by == "group":
            bits = uniform_bits(site.seed, site.key.name, "", "scale", site.offset, size)
            return torch.from_numpy((bits % np.uint32(count)).astype(np.int64)).to(site.stack.device)
        place = torch.arange(site.offset, site.offset + size, device=site.stack.device)
        return place // -(-site.key.numel // count)
