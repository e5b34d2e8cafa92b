"""Every expert as one bit per weight over one shared task vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.errors import RecipeError
from weightsmith.core.keys import Key, Part
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Codec, Each, number
from weightsmith.core.site import Site
from weightsmith.ops.masks import agreed, pack_bits, task_masks, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TallMasks", "consensus_of"]


@dataclass(frozen=True)
class TallMasks(Codec, name="tall_masks", needs=(BASE,)):
    """Store one task vector for all, and a mask per expert.

    Rebuilt: base + m_t tau, tau the merged task vector.
    m_t = |delta_t| > lambda_t |tau - delta_t|, against tau in full precision.  tau is what the method in front
    makes of the task vectors, unscaled: their sum if there is none, or say
    `[{ties: {aggregate: sum, density: 0.2, scope: global}}, tall_masks]`.  Keep that method's own lambda at 1.

    What comes back is not the expert: the paper keeps the experts' accuracy, with lambda tuned for each on labels.
    At lambda >= 1 no weight comes back further from the expert's than the base's is; below, many may.

    Size, for d weights and n experts: d bytes_of(tau) + n d / 8, besides the base.  tau has the output's dtype.
    A mask is one flat string of bits per tensor and expert, as numpy.packbits makes it: no padding but up to 7
    zero bits at its end, and the same bytes wherever the tensor is cut, because cuts fall on multiples of 8 weights.
    One tensor per expert, so that rebuilding an expert reads its own mask only.
    """

    paper = "TALL-masks (Wang et al., ICML 2024), arXiv:2405.07813"

    lambda_: Each = number(0.4, "strictness of the masks; larger is sparser", low=0, each=True)

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        tau = Part.of(key, "tau", key.shape, max(key.row_numel, 1))
        # Bytes; cuts of tensors fall on multiples of 8 weights (`Part.span`).
        packed = (-(-key.numel // 8),)
        return (tau, *(Part("mask", Key(_mask_name(key.name, e), packed, "uint8"), 8, e) for e in experts))

    def encode(self, site: Site) -> dict[str, Tensor]:
        if site.origin is None:
            raise RecipeError("tall_masks stores a merged task vector; put it behind the merging method")
        (tau,) = site.deltas
        # bool [n, *block]
        masks = task_masks(site.origin.deltas, tau, site.origin.spread(self.lambda_))
        names = [_mask_name(site.key.name, expert) for expert in site.origin.names]
        packed = [pack_bits(mask) for mask in masks]
        return {f"{site.key.name}::tau": tau, **dict(zip(names, packed, strict=True))}

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        return base + _masked(parts["tau"], _unpacked(parts, base, offset))

    def advice(self) -> str:
        # At lambda >= 1 a weight is selected only if |tau - delta| < |delta|.
        at_most = max(self.lambda_) if isinstance(self.lambda_, tuple) else self.lambda_
        return (
            "" if at_most >= 1 else "set the lambda of tall_masks to 1, which never loses more, and tune it from there"
        )


def consensus_of(
    experts: Mapping[str, Mapping[str, Tensor]], base: Tensor, offset: int, k: int, scale: float
) -> Tensor:
    """The consensus merge from stored parts alone: base + scale c tau, c = at least k of the masks select the weight.

    experts  name -> the parts that `TallMasks.decode` takes; base: [*block]
    """
    masks = torch.stack([_unpacked(parts, base, offset) for parts in experts.values()])
    # The same part for every expert.
    tau = next(iter(experts.values()))["tau"]
    return base + _masked(tau, agreed(masks, k)) * scale


def _mask_name(name: str, expert: str) -> str:
    return f"{name}::mask.{expert}"


def _unpacked(parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
    return unpack_bits(parts["mask"], offset % 8, base.numel()).reshape(base.shape)


def _masked(tau: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, tau, 0.0)
