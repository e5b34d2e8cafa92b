"""Fuse models by how much each changed the size and the direction of every column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import with_base
from weightsmith.core.lazy import torch
from weightsmith.core.method import Method, Whole, flag, number
from weightsmith.core.site import Site
from weightsmith.ops.combine import weighted_sum
from weightsmith.ops.reduce import pairwise_sum, row_products

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Widen"]


@dataclass(frozen=True)
class Widen(Whole, Method, name="widen", checks=(with_base,)):
    """Weigh the columns of every model by the ranks of their changes.

    Ranks are comparable when sizes are not.
    W_n [out, in] with W_0 of the base, by column j:
    1. m = |W[:, j]|; changes |m_n - m_0| of size and 1 - cos(W_n[:, j], W_0[:, j]) of direction.
    2. Each becomes its rank within the model, 0 .. (in-1) / in: a stable rising order, equals by lower index.
    3. Scores: softmax of the ranks over the models; a rank above t times the model's mean scores s instead.
    4. W = W_0 + sum_n (W_n - W_0) (mean of both scores of the column).  Scores need not sum to 1: with s = 1 two
       models that both hold a column important are added in full.

    Vectors and numbers: |delta| takes the place of the ranks, entry by entry.  More than two dimensions: those
    behind the first count as columns.  Embeddings have one column per token (`transpose_embeddings`).
    float64; a column of zeros has changed its direction by 0 if it is zero in both and by 1 if in one (the
    authors' code: NaN).
    """

    paper = (
        "Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models (Yu et al., 2024), arXiv:2408.03092"
    )

    above_average_value_ratio: float = number(1.0, "t: what is important, as a multiple of the mean rank", low=0)
    score_calibration_value: float = number(1.0, "s: score of what is important", above=0)
    transpose_embeddings: bool = flag(True, "embeddings are stored [tokens, size]: rank tokens")

    def merge(self, site: Site) -> Tensor:
        assert site.base is not None
        shape = site.block_shape
        # The paper ranks the columns of [out, in]; of an embedding [tokens, size] those are dimensions, so it is
        # turned.
        turned = self.transpose_embeddings and site.key.role == "embed" and len(shape) == 2

        def columns(tensor: Tensor) -> Tensor:
            return tensor.T if turned else tensor.reshape(shape[0], -1) if len(shape) > 1 else tensor.reshape(-1)

        if site.base.numel() == 0:
            return site.base
        base, deltas = columns(site.base), [columns(d) for d in site.deltas]  # [out, in], or [m]
        if base.ndim == 1:
            # A vector has one weight per column: its size is all there is to rank.
            kinds = [torch.stack([d.double().abs() for d in deltas])]
            means = [pairwise_sum(kinds[0]) / base.numel()]
        else:
            across = base.T.contiguous()  # [in, out]: columns as rows, which the sums run along
            changes = [_changes(across, columns(expert).T.contiguous()) for expert in site.experts]
            kinds = [torch.stack([_ranks(c[kind]) for c in changes]) for kind in (0, 1)]
            # The mean of the ranks 0 .. in - 1.
            means = [torch.full((site.count,), (base.shape[1] - 1) / 2, dtype=torch.float64, device=base.device)] * 2
        # The mean of the scores by size and by direction: [n, columns].
        scores = weighted_sum(torch.stack([self._scores(k, m) for k, m in zip(kinds, means, strict=True)])) / len(kinds)
        site.tell("widen.most", float(weighted_sum(scores).max()))
        for i, delta in enumerate(deltas):
            site.tell(f"widen.changed.{i}", float(delta.any()))
        merged = base
        # One score per column: it multiplies every row.
        for delta, score in zip(deltas, scores.to(base.dtype), strict=True):
            merged = merged + delta * score
        return (merged.T if turned else merged).reshape(shape).contiguous()

    def says(self, told: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Iterator[str]:
        for i, name in enumerate(names):
            if not any(found[f"widen.changed.{i}"] for found in told.values()):
                yield f"{name} is equal to the base: it only lowers the scores of the others; leave it out"
        most, tensor = max((found["widen.most"], tensor) for tensor, found in told.items())
        if most > 1:
            yield f"scores add up to at most {most:.3g} ({tensor}); above 1 large changes in common overshoot"

    def _scores(self, values: Tensor, means: Tensor) -> Tensor:
        """values: [n, columns], ranks as integers or sizes; means: [n]."""
        length = values.shape[1] if values.dtype == torch.int64 else 1
        shares = values.double() / length
        # A softmax over the models, of ranks in [0, 1).
        powers = torch.exp(shares - shares.amax(0))
        important = values > self.above_average_value_ratio * means[:, None]
        # What is important scores s in every model that has it: scores need not add up to 1.
        return torch.where(important, self.score_calibration_value, powers / weighted_sum(powers))


def _changes(base: Tensor, expert: Tensor) -> tuple[Tensor, Tensor]:
    """How much size and direction of each column have changed, columns as rows: [in, out] twice -> float64 [in]."""
    bb, be, ee = row_products([base.detach(), expert.detach()])  # ranks have no slope
    # The root of a square is exact, so that an unchanged column has changed by exactly 0.
    both = (bb * ee).sqrt()
    cosine = torch.where(both > 0, be / torch.where(both > 0, both, 1.0), (bb == ee).double())
    # |size - size before|, 1 - cosine
    return (ee.sqrt() - bb.sqrt()).abs(), 1 - cosine


def _ranks(values: Tensor) -> Tensor:
    """Place of every entry in the rising order, equals by lower index: int64."""
    # The inverse of a permutation is its argsort.
    return values.argsort(stable=True).argsort()
