"""Exact selection by magnitude, over more than memory holds.

Entries are ranked by falling magnitude, equals by rising flat index.  A *cut* p splits the ranking after its
first p entries.  Three looks find any number of cuts (or two, if all equals at a cut belong together):

    counts of the upper 16 bits
    counts of the lower 16 bits within the bucket of each cut   -> exact threshold
    equals of the threshold, per row                            -> which of them lie before the cut

float64 inputs are ranked by their magnitude rounded to float32.  Everything is integer arithmetic: the same
for every way to cut a tensor into blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from weightsmith.core import kernel
from weightsmith.core.lazy import torch
from weightsmith.core.pass_ import Pass, Rows, Scope, State
from weightsmith.core.site import Site
from weightsmith.kernels.ranks import buckets, thresholds
from weightsmith.kernels.record import HIGH, LOW
from weightsmith.ops.reduce import as_rows

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Cut", "Cuts", "Largest", "histograms", "keep_share", "leading", "magnitude_bits"]


@dataclass(frozen=True, eq=False)
class Cuts:
    """Where cuts lie: arrays [n, cuts] of int64, for n lists.

    threshold  magnitude bits; what is above lies before the cut
    quota      how many of its equals do too
    ties       how many equals there are
    total      entries of a list
    earlier    equals in the rows before, [n, cuts, rows]; None where no cut splits equals
    """

    threshold: np.ndarray
    quota: np.ndarray
    ties: np.ndarray
    total: int
    earlier: np.ndarray | None = None

    @property
    def settled(self) -> bool:
        """Whether no cut splits equals."""
        return bool((self.quota == self.ties).all())

    def before(self, stack: Tensor, start: int = 0) -> list[Tensor]:
        """For each cut, which entries of a block [n, *block] lie before it: a list of bool [n, *block].

        `start` is the block's first row within the tensor.
        """
        threshold, quota, ties = (found.tolist() for found in (self.threshold, self.quota, self.ties))
        # A list of experts is read once for all cuts.
        masks = [torch.empty(stack.shape, dtype=torch.bool, device=stack.device) for _ in threshold[0]]
        for i, bits in enumerate(map(magnitude_bits, stack)):
            for cut, found in enumerate(masks):
                least, wanted = threshold[i][cut], quota[i][cut]
                # All equals are on one side (or there are none on it): no numbering, which costs a cumulative sum.
                if wanted == ties[i][cut]:
                    found[i] = bits >= least if wanted else bits > least
                else:
                    assert self.earlier is not None
                    equal = bits == least
                    # The equal's number within the tensor: those of the rows before, and of this block so far.
                    rank = int(self.earlier[i, cut, start]) + equal.reshape(-1).cumsum(0).reshape(bits.shape)
                    found[i] = (bits > least) | (equal & (rank <= wanted))
        return masks

    def untrimmed(self) -> dict[int, float]:
        """Share of entries that are not 0, of every list whose first cut lies among its zeros."""
        firsts = zip(self.threshold[:, 0].tolist(), self.ties[:, 0].tolist(), strict=True)
        return {i: 1 - zeros / self.total for i, (cut, zeros) in enumerate(firsts) if cut == 0}


@dataclass(frozen=True)
class Cut(Pass[Cuts]):
    """Cuts of the experts' task vectors, or of other lists of numbers (override `values`, and `viewed` with it).

    with_equals  equals at a cut all count as before it
    """

    slope: ClassVar[str] = "flat"

    with_equals: bool = False

    @property
    def rounds(self) -> int:
        return 2 if self.with_equals else 3

    def tells(self, result: Cuts) -> Mapping[str, float]:
        """cut.changed.i: of a cut over the model that trims nothing of list i, the share of its entries not 0."""
        if self.scope is not Scope.MODEL:
            return {}
        return {f"cut.changed.{i}": share for i, share in result.untrimmed().items()}

    @abstractmethod
    def ranks(self, total: int) -> Sequence[Sequence[int]]:
        """For each of n lists, how many of its `total` entries come before each of its cuts."""

    def values(self, site: Site) -> Tensor:
        """n lists of numbers: [n, *block]."""
        return site.deltas

    @property
    def viewed(self) -> Hashable:
        """What `values` depends on besides the site."""
        return None

    def see(self, site: Site) -> State:
        stack = self.values(site)
        return {"high": histograms((b >> 16 for b in map(magnitude_bits, stack)), (stack.shape[0], HIGH))}

    @property
    def seen(self) -> Hashable:
        return Cut, self.viewed  # all magnitudes are counted, whatever is kept of them

    def end(self, total: Mapping[str, Any]) -> Cuts | Pass[Cuts]:
        high = np.asarray(total["high"])  # int64 [n, 65536]
        return self.within(high, self.ranks(int(high[0].sum())))

    def within(self, high: np.ndarray, ranks: Sequence[Sequence[int]]) -> Pass[Cuts]:
        """The next look, after the counts of the upper bits."""
        # Per cut the bucket that it lies in, and how many of that bucket come before it: [n, cuts].
        bucket, left = buckets(high, ranks)
        return _Within(self, _tuples(bucket), _tuples(left), int(high[0].sum()), scope=self.scope)

    @property
    def kernel(self) -> kernel.Look | None:
        return kernel.Ranked(self) if self.viewed is None else None


@dataclass(frozen=True)
class _Within(Pass[Cuts]):
    """The lower bits within the buckets, [n, cuts] as tuples."""

    cut: Cut
    bucket: tuple[tuple[int, ...], ...]
    left: tuple[tuple[int, ...], ...]
    total: int

    def see(self, site: Site) -> State:
        bits = zip(map(magnitude_bits, self.cut.values(site)), self.bucket, strict=True)
        # Only what lies in the bucket is looked at, a small part of the tensor: [n, cuts, 65536].
        low = (b[b >> 16 == bucket] & 0xFFFF for b, found in bits for bucket in found)
        return {"low": histograms(low, (len(self.bucket), len(self.bucket[0]), LOW))}

    @property
    def seen(self) -> Hashable:
        return _Within, self.cut.viewed, self.bucket

    def end(self, total: Mapping[str, Any]) -> Cuts | Pass[Cuts]:
        bucket, left = np.array(self.bucket, np.int64), np.array(self.left, np.int64)
        found = Cuts(*thresholds(np.asarray(total["low"]), bucket, left, self.cut.with_equals), self.total)
        # Over a model a row has no number; over one tensor only split equals have to be numbered.
        return found if self.cut.with_equals or found.settled else _Equals(self.cut, found)

    @property
    def kernel(self) -> kernel.Look | None:
        return kernel.Within(tuple(found[0] for found in self.bucket)) if self.cut.kernel is not None else None


@dataclass(frozen=True)
class _Equals(Pass[Cuts]):
    """The equals at each cut, row by row."""

    cut: Cut
    found: Cuts

    def see(self, site: Site) -> State:
        bits = zip(map(magnitude_bits, self.cut.values(site)), self.found.threshold.tolist(), strict=True)
        # [n, cuts, rows]: counts per row let any block number its equals by itself.
        equal = [torch.stack([(as_rows(b) == t).sum(1) for t in thresholds]) for b, thresholds in bits]
        return {"equal": Rows(torch.stack(equal).cpu())}

    @property
    def seen(self) -> Hashable:
        return _Equals, self.cut.viewed, _tuples(self.found.threshold)

    def end(self, total: Mapping[str, Any]) -> Cuts:
        equal = np.asarray(total["equal"])
        # Exclusive: the equals in the rows before.
        return replace(self.found, earlier=equal.cumsum(-1) - equal)


@dataclass(frozen=True)
class Largest(Cut):
    """One cut per list, after the share of it that is kept.

    Over a tensor exactly `keep_share` entries; over a model every entry at or above the (int(density d) + 1)-th
    largest of all d.
    """

    densities: tuple[float, ...] = ()

    def ranks(self, total: int) -> list[list[int]]:
        if self.scope is Scope.TENSOR:
            # mergekit's rule
            return [[keep_share(total, d)] for d in self.densities]
        # The authors' rule: kthvalue(d - int(density d)) and everything at or above it.
        return [[total if d == 1 else min(int(total * d) + 1, total)] for d in self.densities]


def _tuples(found: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, found.tolist()))


def magnitude_bits(values: Tensor) -> Tensor:
    """|x| as float32 bits, int32, ordered as |x| is."""
    # Without the sign bit the bits of IEEE floats are ordered as the magnitudes; -0 is 0.
    return values.detach().to(torch.float32).view(torch.int32) & 0x7FFFFFFF


def histograms(buckets: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
    """How often each of 0 .. shape[-1] - 1 occurs in several lists: int64 [*shape] on the CPU.

    Made one by one: those of 48 experts are large.
    """
    out = torch.empty(shape, dtype=torch.int64)
    for counts, found in zip(out.view(-1, shape[-1]), buckets, strict=True):
        # bincount of an accelerator is copied here: all states are added up on the CPU.
        counts.copy_(torch.bincount(found.reshape(-1), minlength=shape[-1]))
    return out


def keep_share(total: int, density: float) -> int:
    """How many of `total` entries a density keeps: int(density * total), at least one."""
    return total if density >= 1 else max(1, int(density * total))


def leading(values: Tensor, count: int) -> Tensor:
    """The `count` largest |x| of each row, equals by lower index: bool, shaped like values [..., m]."""
    length = values.shape[-1]
    if count <= 0 or count >= length:
        return torch.full(values.shape, count > 0, dtype=torch.bool, device=values.device)
    size = values.detach().abs()
    # kthvalue counts the smallest, from 1.
    threshold = size.kthvalue(length - count + 1, dim=-1, keepdim=True).values
    larger, equal = size > threshold, size == threshold
    # As many of the equals as there is room for, from the left.
    return larger | (equal & (equal.cumsum(-1) <= count - larger.sum(-1, keepdim=True)))
