"""Low-rank layers beside the few rows that they miss most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.codecs.exact import Exact
from weightsmith.core.checks import dims
from weightsmith.core.keys import Key, Part
from weightsmith.core.lazy import torch
from weightsmith.core.method import StandaloneCodec, Whole, flag, number
from weightsmith.core.site import Site
from weightsmith.ops.spectral import padded, top_svd

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Losparse"]


@dataclass(frozen=True)
class Losparse(Whole, StandaloneCodec, name="losparse", checks=(dims(2, 3),), otherwise="exact"):
    """Store each weight as a low-rank product, and the rows that this misses most as they are.

    The weight itself is stored, not its change.
    Weight W [out, in] ~ L R^T + S: thin SVD of W, L = U_r sqrt(S_r) [out, r], R = V_r sqrt(S_r) [in, r]; of the rest
    S = W - L R^T the rows of largest norm are kept, so that those come back exactly, up to their rounding.  Experts
    that are stacked, [experts, out, in], are factored one by one; their rows compete with each other.
    A weight is factored if that takes less room; embeddings, the output head (unless `head`) and other tensors are
    stored as they are (`exact`).  Without a base in the recipe one model is compressed by itself.

    MC-SMoE scores rows by |weight x gradient| while it distils L, R and S on data.  This is the first step alone,
    which needs none.
    """

    paper = "Merge, Then Compress: MC-SMoE (Li et al., ICLR 2024), arXiv:2310.01334; LoSparse (Li et al., ICML 2023)"

    ratio: float = number(0.15, "share of numbers in L and R: r = ceil(ratio m n / (m + n))", above=0, high=1)
    rows: float = number(0.1, "share of the rest's rows that are kept", low=0, high=1)
    head: bool = flag(False, "factor the output head too")

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        rank, kept = self._sizes(key)
        if not rank:
            return Exact().parts(key, experts)
        *stack, rows, columns = key.shape
        found: list[Part] = []
        for e in experts:
            # Stored by rows as the weight is, or by stacked experts; R whole where there is one.
            found.append(Part.of(key, "left", (*stack, rows, rank), key.row_numel, e))
            found.append(Part.of(key, "right", (*stack, columns, rank), key.row_numel if stack else 0, e))
            if kept:
                found.append(Part.of(key, "rest", (kept, columns), 0, e))
                found.append(Part("place", Key(f"{key.name}::place.{e}", (kept,), "int32"), 0, e))
        return tuple(found)

    def encode(self, site: Site) -> dict[str, Tensor]:
        rank, kept = self._sizes(site.key)
        if not rank:
            return Exact().encode(site)
        stored = {part.name: getattr(torch, part.key.dtype) for part in self.parts(site.key, ("",))}
        found: dict[str, Tensor] = {}
        for expert, weight in zip(site.names, site.experts, strict=True):
            *stack, rows, columns = weight.shape
            one_each = weight.double().reshape(-1, rows, columns)
            sides = [padded(top_svd(w, rank), rank) for w in one_each]
            left = torch.stack([u * s.sqrt() for u, s, _ in sides]).to(stored["left"])
            right = torch.stack([v * s.sqrt() for _, s, v in sides]).to(stored["right"])
            found[f"{site.key.name}::left.{expert}"] = left.reshape(*stack, rows, rank)
            found[f"{site.key.name}::right.{expert}"] = right.reshape(*stack, columns, rank)
            if kept:
                # What the factors as they are stored miss: [experts x out, in].
                rest = (one_each - left.double() @ right.double().mT).reshape(-1, columns)
                order = torch.linalg.vector_norm(rest, dim=1).sort(descending=True, stable=True).indices
                place = order[:kept].sort().values
                found[f"{site.key.name}::rest.{expert}"] = rest[place]
                found[f"{site.key.name}::place.{expert}"] = place.int()
        return found

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        # No base: the weight itself is stored.
        if "whole" in parts:
            return parts["whole"]
        found = parts["left"] @ parts["right"].mT
        if "rest" in parts:
            rows = found.reshape(-1, found.shape[-1])
            place = parts["place"].long() - offset // rows.shape[1]
            here = (place >= 0) & (place < len(rows))
            found = rows.index_add(0, place[here], parts["rest"][here].to(rows)).reshape(found.shape)
        return found

    def _sizes(self, key: Key) -> tuple[int, int]:
        """The rank, 0 for a weight that stays whole, and how many rows of the rest are kept."""
        if key.role == "embed" or (key.role == "head" and not self.head) or not key.numel:
            return 0, 0
        *_, rows, columns = key.shape
        count = key.numel // (rows * columns)
        rank = min(-int(-self.ratio * rows * columns // (rows + columns)), rows, columns)
        kept = round(self.rows * count * rows)
        smaller = count * rank * (rows + columns) + kept * columns < key.numel
        return (rank, kept) if smaller else (0, 0)
