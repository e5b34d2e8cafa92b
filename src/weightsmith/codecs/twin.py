"""One shared model, and what each expert has beyond it in compressed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.codecs.tsvc import kept_rank, low_rank_parts
from weightsmith.core.checks import dims
from weightsmith.core.errors import RecipeError
from weightsmith.core.keys import Key, Part
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Codec, Whole, choice, number
from weightsmith.core.site import Site
from weightsmith.ops.noise import uniform_bits
from weightsmith.ops.select import keep_share, leading
from weightsmith.ops.spectral import low_rank, padded, svd_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Twin"]


@dataclass(frozen=True)
class Twin(Whole, Codec, name="twin", needs=(BASE,), checks=(dims(2),), otherwise="exact"):
    """Store a shared change once, and what each expert has beyond it in compressed form.

    Stored: tau of the method before it, and of each expert v_t = delta_t - tau.
    Expert t is rebuilt as base + tau + v_t.  Put it behind any method: `[{task_arithmetic: {lambda: 0.3}}, twin]` is
    the authors' choice.  Tensors that are no matrices are stored as they are (`exact`).

    svd        the floor(density min(m, n)) leading singular triplets of v_t, at least one
    magnitude  the floor(density m n) largest entries, at least one, with their positions
    random     as many entries at random, divided by density (the authors toss a coin per entry)

    tau has the output's dtype, and v_t is taken against tau as stored.
    """

    paper = "Twin-Merging (Lu et al., NeurIPS 2024), arXiv:2406.15479"

    density: float = number(0.1, "share of each exclusive part kept (1 - mask_rate)", above=0, high=1)
    strategy: str = choice("svd", "how the exclusive parts are compressed", "svd", "magnitude", "random")

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        # tau by rows.
        shared = Part.of(key, "tau", key.shape, max(key.row_numel, 1))
        if self.strategy == "svd":
            rank = kept_rank(key, self.density)
            return (shared, *(part for e in experts for part in low_rank_parts(key, rank, e)))
        # Positions in the flat tensor and values there, whole: how many fall into some rows is known from them only.
        count, found = (self._count(key),), [shared]
        for e in experts:
            place = Key(f"{key.name}::place.{e}", count, "int64")
            found += [Part("place", place, 0, e), Part.of(key, "value", count, 0, e)]
        return tuple(found)

    def encode(self, site: Site) -> dict[str, Tensor]:
        if site.origin is None:
            raise RecipeError("twin stores a merged task vector; put it behind the merging method")
        name, tau = site.key.name, site.deltas[0]
        dtype = getattr(torch, Part.of(site.key, "tau", site.key.shape, 1).key.dtype)
        # What rounding tau loses is in v_t, and so is not lost.
        stored = tau.to(dtype).to(tau.dtype)
        found = {f"{name}::tau": tau}
        for expert, delta in zip(site.origin.names, site.origin.deltas, strict=True):
            own = self._compressed(site, delta - stored, expert)
            found |= {f"{name}::{part}.{expert}": value for part, value in own.items()}
        return found

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        shared = base + parts["tau"]
        if self.strategy == "svd":
            return shared + low_rank(parts)
        # Of all entries those of these rows.
        place = parts["place"] - offset
        here = (place >= 0) & (place < base.numel())
        own = torch.zeros_like(base).reshape(-1).index_put((place[here],), parts["value"][here])
        return shared + own.reshape(base.shape)

    def _count(self, key: Key) -> int:
        return min(keep_share(key.numel, self.density), key.numel)

    def _compressed(self, site: Site, own: Tensor, expert: str) -> dict[str, Tensor]:
        if self.strategy == "svd":
            rank = kept_rank(site.key, self.density)
            return dict(padded(svd_of(own, rank), rank)._asdict())
        flat, count = own.reshape(-1), self._count(site.key)
        rank_by, scale = flat, 1.0
        if self.strategy == "random":
            # The `count` largest of random numbers are a random set of exactly that size.
            drawn = uniform_bits(site.seed, site.key.name, expert, "twin", 0, flat.numel()).astype("float64")
            rank_by, scale = torch.from_numpy(drawn).to(flat.device), flat.numel() / count
        place = leading(rank_by, count).nonzero()[:, 0]  # int64 [count], rising
        return {"place": place, "value": flat[place] * scale}
