"""Low-rank layers that lose least where the loss is sensitive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.codecs.exact import Exact
from weightsmith.core.checks import dims
from weightsmith.core.errors import NumericError
from weightsmith.core.keys import Key, Part
from weightsmith.core.method import StandaloneCodec, Whole, choice, flag, number
from weightsmith.core.site import Site
from weightsmith.ops.reduce import row_sums
from weightsmith.ops.spectral import Svd, padded, top_svd

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fwsvd"]

STEPS = 30
"""Iterations of the element-wise weighting."""


@dataclass(frozen=True)
class Fwsvd(Whole, StandaloneCodec, name="fwsvd", needs=("fisher",), checks=(dims(2),), otherwise="exact"):
    """Store each weight as a low-rank product, weighted by its Fisher information.

    The weight itself is stored, not its change.
    Weight W [out, in] with Fisher F of the same shape (statistic "fisher"): importance of input j
    a_j = sum_i F_ij; thin SVD W diag(sqrt a) = U S V^T; stored left = U_r S_r [out, r] and
    right = diag(1 / sqrt a) V_r [in, r], W ~ left right^T.  This minimises sum_ij a_j (W - W_r)_ij^2 exactly.
    A weight is factored if that takes less room, r (out + in) < out in; embeddings, the output head (unless `head`),
    other tensors and those without a Fisher are stored as they are (`exact`).  Without a base in the recipe one model
    is compressed by itself: nothing else is needed to restore it.

    weighting  row_sum as above; none: plain SVD; element: sum_ij F_ij (W - W_r)_ij^2, lowered in 30 steps
               X <- SVD_r(F W + (1 - F) X), F scaled to a maximum of 1 (Srebro and Jaakkola, ICML 2003)
    balanced   left = U_r sqrt(S_r) and right = diag(1 / sqrt a) V_r sqrt(S_r): the same product
    """

    paper = "Language model compression with weighted low-rank factorization (Hsu et al., ICLR 2022), arXiv:2207.00112"

    rank: float | str = number("auto", "rank r; auto: from ratio", low=1, options=("auto",), kind="integer")
    ratio: float = number(0.5, "target share of parameters: r = floor(ratio m n / (m + n))", above=0, high=1)
    weighting: str = choice("row_sum", "what the error is weighted with", "row_sum", "none", "element")
    floor: float = number(1e-8, "least importance of an input, relative to the mean", above=0)
    head: bool = flag(False, "factor the output head too")
    always: bool = flag(False, "factor weights also where that takes more room")
    transposed: bool = flag(False, "weights are stored [in, out], as GPT-2's Conv1D does")
    balanced: bool = flag(False, "share S between the factors, its root each: for training or quantising them")

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        rank = self._rank(key)
        if not rank:
            return Exact().parts(key, experts)
        # left is stored by rows of the weight, right whole: any rows are left[rows] right^T.
        rows, columns = key.shape
        found: list[Part] = []
        for e in experts:
            found.append(Part.of(key, "left", (rows, rank), max(columns, 1), e))
            found.append(Part.of(key, "right", (columns, rank), 0, e))
        return tuple(found)

    def encode(self, site: Site) -> dict[str, Tensor]:
        rank = self._rank(site.key)
        found: dict[str, Tensor] = {}
        if not rank:
            return Exact().encode(site)
        for expert, weight, fisher in zip(site.names, site.experts, site.stats["fisher"], strict=True):
            self._check(site, expert, fisher)
            left, right = self._factors(weight, fisher, rank)
            found[f"{site.key.name}::left.{expert}"] = left
            found[f"{site.key.name}::right.{expert}"] = right
        return found

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        # No base: the weight itself is stored.
        return parts["whole"] if "whole" in parts else parts["left"] @ parts["right"].T

    def _rank(self, key: Key) -> int:
        """The rank, or 0 for a weight that stays whole."""
        rows, columns = key.shape
        if key.role == "embed" or (key.role == "head" and not self.head) or not key.numel:
            return 0
        # r (m + n) numbers instead of m n: the rank at which they are `ratio` of it.
        rank = int(self.ratio * key.numel / (rows + columns)) if isinstance(self.rank, str) else int(self.rank)
        rank = max(min(rank, rows, columns), 1)
        return rank if self.always or rank * (rows + columns) < key.numel else 0

    def _check(self, site: Site, expert: str, fisher: Tensor) -> None:
        if fisher.shape != site.key.shape:
            raise NumericError(
                f"{site.key.name}: the fisher of {expert} has shape {list(fisher.shape)} for a weight of "
                f"{list(site.key.shape)}; observe this model again"
            )
        if bool((fisher < 0).any()) or not bool(fisher.any()):
            raise NumericError(
                f"{site.key.name}: the fisher of {expert} is negative somewhere, or zero everywhere; "
                "observe it on more data"
            )

    def _factors(self, weight: Tensor, fisher: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """All in float64."""
        if self.weighting == "element":
            weight, fisher = weight.double(), fisher.double()
            # Expectation maximisation for element-wise weights, which no SVD minimises exactly.
            share, x = fisher / fisher.max(), top_svd(weight, rank)
            for _ in range(STEPS):
                x = top_svd(share * weight + (1 - share) * x.product, rank)
            return self._split(x, rank)
        if self.weighting == "none":
            return self._split(top_svd(weight.double(), rank), rank)
        # a_j over the outputs, one per input: [in].
        importance = row_sums(fisher if self.transposed else fisher.T)
        # An input without any importance would divide by 0 below.
        root = importance.clamp(min=self.floor * float(importance.mean())).sqrt()
        if self.transposed:
            # Conv1D: inputs are rows, and their roots are divided out of left.
            left, right = self._split(top_svd(weight * root[:, None], rank), rank)
            return left / root[:, None], right
        left, right = self._split(top_svd(weight * root, rank), rank)
        return left, right / root[:, None]

    def _split(self, found: Svd, rank: int) -> tuple[Tensor, Tensor]:
        u, s, v = padded(found, rank)
        # [out, r] and [in, r]; padded with zeros where the weight has a lower rank.
        return (u * s.sqrt(), v * s.sqrt()) if self.balanced else (u * s, v)
