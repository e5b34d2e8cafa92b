"""Every expert as one bit per weight and one factor per tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.checks import dims
from weightsmith.core.keys import Key, Part
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Pass, StandaloneCodec
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.ops.masks import pack_bits, run_length, unpack_bits
from weightsmith.ops.reduce import block_sizes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Bitdelta"]


@dataclass(frozen=True)
class Bitdelta(StandaloneCodec, name="bitdelta", needs=(BASE,), checks=(dims(2, 99),), otherwise="exact"):
    """Store one bit per change and one factor per tensor.

    Rebuilt: base + a_t sign(delta_t), a_t = mean |delta_t| of the tensor.
    Of all factors that one has the least squared error, 1 - mean(|delta|)^2 / mean(delta^2) of |delta|^2.  A change of
    zero counts as minus.  The paper goes on to tune the factors on data, and applies this to the matrices of the
    blocks: vectors are stored as they are (`exact`), and so should embeddings and head be (a rule with method exact).
    Size: d / 8 bytes per expert, and 4 per 65536 weights.
    """

    paper = "BitDelta (Liu et al., NeurIPS 2024), arXiv:2402.10193"

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return (FACTORS,)

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        # A bit per weight, eight to a byte; the factor again every 65536 weights, so that any rows find one.
        run, packed = run_length(key.row_numel), (-(-key.numel // 8),)
        return (
            *(Part("sign", Key(f"{key.name}::sign.{e}", packed, "uint8"), 8, e) for e in experts),
            *(Part("factor", Key(f"{key.name}::factor.{e}", (-(-key.numel // run),), "float32"), run, e)
              for e in experts),
        )  # fmt: skip

    def encode(self, site: Site) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        name, run = site.key.name, self.parts(site.key, ("",))[-1]
        low, high = run.rows(site.offset, site.offset + site.deltas[0].numel())  # runs that begin in this block
        for expert, delta, factor in zip(site.names, site.deltas, site.result(FACTORS), strict=True):
            found[f"{name}::sign.{expert}"] = pack_bits(delta > 0)
            # One number, as often as there are runs: [runs of the block].
            found[f"{name}::factor.{expert}"] = factor.float().expand(high - low)
        return found

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        if base.numel() == 0:
            return base
        # Rows may begin within a byte.
        plus = unpack_bits(parts["sign"], offset % 8, base.numel()).reshape(base.shape)
        factor = parts["factor"].reshape(-1)[0]
        return base + torch.where(plus, factor, -factor)


@dataclass(frozen=True)
class _Factors(Pass[Any]):
    """mean |delta| of each expert: float64 [n]."""

    def see(self, site: Site) -> State:
        deltas = site.deltas
        # float64 [n]; on the CPU, where states are added up
        sizes = torch.stack([block_sizes(delta) for delta in deltas]).cpu()
        return {"sizes": sizes, "count": torch.tensor(deltas[0].numel())}

    def end(self, total: Mapping[str, Any]) -> Tensor:
        found: Tensor = total["sizes"] / total["count"].clamp(min=1)
        return found


FACTORS = _Factors()
