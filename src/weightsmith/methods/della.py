"""Drop changes at random, small ones more often."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from weightsmith.core import kernel
from weightsmith.core.checks import Case, Verdict, refuse, small_changes
from weightsmith.core.kernel import Drop
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Each, Pass, Rows, choice, flag, number
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.ops.combine import spread
from weightsmith.ops.noise import keep_masks
from weightsmith.ops.rescale import L1, Masking

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Della"]


@dataclass(frozen=True)
class Della(Masking, name="della", needs=(BASE,), checks=(small_changes,)):
    """Drop changes at random, small ones more often than large ones.

    An entry is kept with probability density - epsilon + 2 epsilon r, r its rank by |delta| from 0 to 1.
    Ranks are taken along the second axis, input by input (a vector is one row), equals by index; a row of one entry
    has r = 1/2.  density 1 leaves everything as it is; else 0 < density - epsilon and density + epsilon < 1.
    rescale_rule l1 is mergekit's: sum |delta| / sum |kept delta| per tensor; expectation, the paper's: each survivor
    is divided by its own probability.  Masks are keyed by (seed, tensor, expert's name), see `ops.noise`: mergekit's
    draws cannot be matched bit by bit, only in distribution.  mergekit's `della` is this before ties with density 1,
    its `della_linear` this before task_arithmetic.
    """

    paper = "DELLA-Merging (Deep et al., 2024), arXiv:2406.11617"

    density: Each = number(0.5, "mean probability of keeping an entry", above=0, high=1, each=True)
    epsilon: Each = number(0.15, "half the span of probabilities", low=0, below=0.5, each=True)
    rescale: bool = flag(True, "scale the survivors up")
    rescale_rule: str = choice(
        "l1", "l1: keep each tensor's L1 norm; expectation: divide by each entry's probability", "l1", "expectation"
    )

    @property
    def keeps_l1(self) -> bool:
        return self.rescale and self.rescale_rule == "l1"

    def masking(self, count: int) -> tuple[Pass[Any], ...]:
        # Rows of a matrix are whole in every block; a vector may be cut.
        return (VECTOR_RANKS,)

    def check(self, case: Case) -> Iterable[Verdict]:
        for density, epsilon in zip(spread(self.density, case.count), spread(self.epsilon, case.count), strict=True):
            if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                return refuse(
                    f"density {density:g} with epsilon {epsilon:g} gives probabilities outside (0, 1); "
                    f"choose epsilon below {min(density, 1 - density):g}"
                )
        return ()

    def fused(self, count: int) -> Drop | None:
        if self.rescale and not self.keeps_l1:
            return None  # each survivor has a divisor of its own
        shares = list(zip(spread(self.density, count), spread(self.epsilon, count), strict=True))
        # Probability low + span rank, from density - epsilon to density + epsilon.
        lows = tuple(density if density >= 1 else density - epsilon for density, epsilon in shares)
        spans = tuple(0.0 if density >= 1 else 2 * epsilon for density, epsilon in shares)
        factors = L1(self) if self.rescale else None
        return Drop(lows, self.name, factors, spans=spans, ranks=VECTOR_RANKS)

    def apply(self, site: Site) -> Site:
        if self.keeps_l1 or not self.rescale:
            return super().apply(site)
        # [*block] each; one at a time, not n probabilities at once
        kept = zip(self.masked(site), self._probabilities(site, site.deltas), strict=True)
        return site.with_deltas(torch.stack([delta / p for delta, p in kept]))

    def masked(self, site: Site) -> Tensor:
        deltas = site.deltas
        return torch.where(keep_masks(site, self._probabilities(site, deltas), self.name), deltas, 0.0)

    def _probabilities(self, site: Site, deltas: Tensor) -> list[float | Tensor]:
        return [self._shares(site, i, delta) for i, delta in enumerate(deltas)]

    def _shares(self, site: Site, index: int, delta: Tensor) -> float | Tensor:
        density, epsilon = site.spread(self.density)[index], site.spread(self.epsilon)[index]
        if density >= 1 or not site.key.shape:
            return density
        if len(site.key.shape) == 1:
            known = site.result(VECTOR_RANKS)[index, site.start : site.start + delta.shape[0]]
            ranks = torch.from_numpy(known).to(delta.device)
        else:
            # Ranks along axis 1, the inputs of a matrix; moved to the end, where they are contiguous.
            ranks = _ranks(delta.detach().abs().transpose(1, -1)).transpose(1, -1)
        # The smallest entry gets density - epsilon, the largest density + epsilon.
        shares: Tensor = (density - epsilon + 2 * epsilon * ranks).to(delta.dtype)
        return shares


@dataclass(frozen=True)
class _VectorRanks(Pass[np.ndarray]):
    """The ranks of a vector's entries: a vector may come in pieces, but its ranks need all of it; vectors are small."""

    slope: ClassVar[str] = "flat"

    def applies(self, key: Key) -> bool:
        return len(key.shape) == 1

    def see(self, site: Site) -> State:
        return {"sizes": Rows(site.deltas.detach().abs().cpu())}

    def end(self, total: Mapping[str, Any]) -> np.ndarray:
        sizes = np.asarray(total["sizes"])
        last = sizes.shape[-1] - 1
        # A single entry is neither small nor large.
        if last < 1:
            return np.full_like(sizes, 0.5)
        ranks, shares = np.empty_like(sizes), np.arange(last + 1).astype(sizes.dtype) / sizes.dtype.type(last)
        np.put_along_axis(ranks, sizes.argsort(-1, kind="stable"), np.broadcast_to(shares, sizes.shape), -1)
        return ranks

    @property
    def kernel(self) -> kernel.Look | None:
        return kernel.Magnitudes()


VECTOR_RANKS = _VectorRanks()


def _ranks(sizes: Tensor) -> Tensor:
    """Ranks along the last axis from 0 (smallest) to 1, equals by lower index; 1/2 in rows of one entry."""
    last = sizes.shape[-1] - 1
    if last < 1:
        return torch.full_like(sizes, 0.5)
    order = _rising(sizes)
    shares = torch.arange(last + 1, dtype=sizes.dtype, device=sizes.device) / last
    return torch.empty_like(sizes).scatter_(-1, order, shares.expand(sizes.shape))


def _rising(sizes: Tensor) -> Tensor:
    """The stable order of sizes >= 0 along the last axis: int64."""
    if sizes.dtype != torch.float32 or sizes.device.type != "cpu":
        return sizes.argsort(dim=-1, stable=True)
    # The bits of such numbers are in their order.  With the index below them all differ, so that a plain sort of
    # integers, three times as fast as a stable one of places, gives the same.
    bits = sizes.contiguous().view(torch.int32).to(torch.int64)
    keys = (bits << 32) | torch.arange(sizes.shape[-1])
    keys.numpy().sort(axis=-1)
    return keys & 0xFFFFFFFF
