"""Every expert as one bit per weight and one factor over one elected task vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import RecipeError
from weightsmith.core.keys import DTYPES, Key, Part
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Codec, Pass, Scope
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.ops.masks import pack_bits, run_length, unpack_bits
from weightsmith.ops.reduce import pairwise_sum, row_sizes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EmrMasks"]


@dataclass(frozen=True)
class EmrMasks(Codec, name="emr_masks", needs=(BASE,)):
    """Store one task vector, and a mask and a factor per expert.

    Rebuilt: base + f_t m_t tau, tau made by the method before it.
    m_t = delta_t tau > 0 (the same sign); f_t = sum |delta_t| / sum |m_t tau| over all tensors, which gives the expert
    its mean size back; 0 where nothing agrees.  The published method is `[emr, emr_masks]`.

    Size, for d weights and n experts: d bytes_of(tau) + n d / 8, and 4 bytes per 65536 weights and expert.
    """

    paper = "EMR-Merging (Huang et al., NeurIPS 2024), arXiv:2405.17461"

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return (FACTORS,)

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        # Task vectors are smaller than the smallest 8-bit floats.
        dtype = "bfloat16" if DTYPES[key.dtype].itemsize == 1 else key.dtype
        row = max(key.row_numel, 1)
        run = run_length(row)
        # Bytes of a mask; runs of weights that share a copy of the factor.
        packed, runs = (-(-key.numel // 8),), (-(-key.numel // run),)
        return (
            Part("tau", Key(f"{key.name}::tau", key.shape, dtype), row),
            *(Part("mask", Key(f"{key.name}::mask.{e}", packed, "uint8"), 8, e) for e in experts),
            *(Part("factor", Key(f"{key.name}::factor.{e}", runs, "float32"), run, e) for e in experts),
        )

    def encode(self, site: Site) -> dict[str, Tensor]:
        # [*block] and [n, *block]
        tau, deltas = _split(site)
        assert site.origin is not None
        made = {f"{site.key.name}::tau": tau}
        sign = tau.sign()
        masks = (delta * sign > 0 for delta in deltas)  # a sign is 1, 0 or -1, so that no product vanishes
        found = zip(site.origin.names, masks, site.result(FACTORS), strict=True)
        run = self.parts(site.key, ("",))[-1]
        low, high = run.rows(site.offset, site.offset + tau.numel())
        for expert, mask, factor in found:
            made[f"{site.key.name}::mask.{expert}"] = pack_bits(mask)
            made[f"{site.key.name}::factor.{expert}"] = factor.float().expand(high - low)
        return made

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        if base.numel() == 0:
            return base
        mask = unpack_bits(parts["mask"], offset % 8, base.numel()).reshape(base.shape)
        return base + torch.where(mask, parts["tau"], 0.0) * parts["factor"].reshape(-1)[0]


@dataclass(frozen=True)
class _Factors(Pass[Any]):
    """f_t of each expert: float64 [n]."""

    def see(self, site: Site) -> State:
        tau, deltas = _split(site)
        sign, size = tau.sign(), tau.abs()
        # min(|tau|, 0 or the largest number) is |tau| where they agree, else 0.
        largest = torch.finfo(tau.dtype).max
        sums = []
        for delta in deltas:
            agreeing = (delta * sign).sign().relu()  # 1 or 0
            kept = torch.minimum(size, agreeing * largest)  # a tenth of the time of `torch.where`
            # float64 [2]: sum |delta_t| and sum |m_t tau|
            sums.append(pairwise_sum(torch.stack([row_sizes(delta), row_sizes(kept)])))
        return {"sizes": torch.stack(sums).cpu()}

    def end(self, total: Mapping[str, Any]) -> Tensor:
        own, kept = torch.as_tensor(total["sizes"]).unbind(-1)
        # The inner where: no division by 0, not even one that is thrown away.
        return torch.where(kept > 0, own / torch.where(kept > 0, kept, 1.0), 0.0)


FACTORS = _Factors(scope=Scope.MODEL)


def _split(site: Site) -> tuple[Tensor, Tensor]:
    """tau and the experts' own task vectors."""
    if site.origin is None:
        raise RecipeError("emr_masks stores a merged task vector; put it behind the merging method, emr")
    return site.deltas[0], site.origin.deltas
