"""All experts added up under random signs, which bring any of them back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.keys import Key, Part
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, StandaloneCodec
from weightsmith.core.site import Site
from weightsmith.ops.masks import run_length
from weightsmith.ops.noise import uniform_bits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Randes"]


@dataclass(frozen=True)
class Randes(StandaloneCodec, name="randes", needs=(BASE,)):
    """Store one sum of all changes; the other experts' part of it acts as noise.

    S = sum_t p_t delta_t, p_t random signs, is stored once; expert t comes back as base + p_t S.
    p_t p_t = 1, so p_t S = delta_t + sum_{u != t} p_t p_u delta_u: the others turn into noise of mean 0, which a
    network bears better than the sum itself.  One expert comes back as it was.  The signs follow from one number per
    expert and tensor, drawn by the recipe's seed and stored: 8 bytes per 65536 weights and expert beside S.
    The paper also shuffles layers among each other; this does not.
    """

    paper = "RanDeS: Randomized Delta Superposition (Zhou et al., 2025), arXiv:2505.11204; random signs only"

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        run = run_length(key.row_numel)
        runs = (-(-key.numel // run),)
        return (
            Part.of(key, "sum", key.shape, max(key.row_numel, 1)),
            *(Part("signs", Key(f"{key.name}::signs.{e}", runs, "int64"), run, e) for e in experts),
        )

    def encode(self, site: Site) -> dict[str, Tensor]:
        name, run = site.key.name, self.parts(site.key, ("",))[-1]
        added: Tensor = torch.zeros_like(site.deltas[0])
        low, high = run.rows(site.offset, site.offset + added.numel())  # runs that begin in this block
        found: dict[str, Tensor] = {}
        for expert, delta in zip(site.names, site.deltas, strict=True):
            # One number per tensor and expert, from which all its signs follow: no seed is needed to restore.
            drawn = int(uniform_bits(site.seed, name, expert, "randes", 0, 1)[0])
            # A product with 1 or -1 is exact, and so is its inverse.
            added = added + delta * signs(drawn, site.offset, added)
            found[f"{name}::signs.{expert}"] = torch.full((high - low,), drawn, dtype=torch.int64)
        return {f"{name}::sum": added, **found}

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        if base.numel() == 0:
            return base
        return base + parts["sum"] * signs(int(parts["signs"].reshape(-1)[0]), offset, base)


def signs(number: int, offset: int, like: Tensor) -> Tensor:
    """Random signs for the flat positions from `offset` on, shaped like a block."""
    # The lowest bit of each number, at its flat position: any block has its signs.
    bits = uniform_bits(number, "", "", "randes signs", offset, like.numel()) & 1
    return torch.from_numpy(bits.astype("float32") * 2 - 1).reshape(like.shape).to(like)
