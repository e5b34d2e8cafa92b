"""Add models one after another, each cleaned of what is merged already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weightsmith.keys import Key
from weightsmith.lazy import torch
from weightsmith.method import BASE, Grain, Method, Rows, Scope, Stage, number
from weightsmith.ops.reduce import block_sums
from weightsmith.ops.spectral import NOISE, top_svd
from weightsmith.site import Site, Summary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Opcm"]


@dataclass(frozen=True)
class Opcm(
    Method,
    name="opcm",
    needs=(BASE,),
    paper="OPCM (Tang et al., NeurIPS 2025), arXiv:2501.09522",
    grain=Grain.TENSOR,
    scratch=0.0,
    matrix=13.0,
    square=4.6,
    cost=640.0,
    cubic=True,
    streams=True,
):
    """Continual merging: project each new task vector away from the directions that the merged ones use most.

    In recipe order, from A = tau_1, for t = 2, 3, ...: A = U S V^T, r = number of leading singular values up to the
    one whose cumulative share of their sum exceeds alpha, that one left out; from U^T tau_t V take away the
    leading r x r block and the diagonal; A <- A + what is left of tau_t.  Tensors that are no matrices and
    embeddings are added as they are.  Result: base + A mean_i |tau_i| / |A|, norms over the whole model.

    To add models to an earlier merge without its experts, give that merge as the first model: it holds `merged` models
    and A is `lambda` times its task vector.  auto reads both from what its run noted in weightsmith.json.
    The diagonal is removed up to 1e-6 of the largest singular value (the authors' code goes on into directions that
    are rounding noise).  No order but the recipe's: the authors shuffle.
    """

    alpha: float = number(0.5, "share of the merged spectrum that counts as occupied", low=0, below=1)
    merged: float | str = number(
        "auto", "models that the first one holds, if it is an earlier merge", low=1, options=("auto",), kind="integer"
    )
    lambda_: float | str = number(
        "auto", "scale of that earlier merge, from its weightsmith.json", above=0, options=("auto",)
    )

    @property
    def rounds(self) -> int:
        return 1

    @property
    def scope(self) -> Scope:
        return Scope.MODEL

    def informed(self, key: Key, notes: Mapping[str, Mapping[str, Any]]) -> Stage:
        """With what the first model's run noted, where that was this method."""
        earlier = notes.get("earlier", {}).get(self.name, {})
        return replace(
            self,
            merged=earlier.get("merged", 1) if self.merged == "auto" else self.merged,
            lambda_=earlier.get("lambda", 1.0) if self.lambda_ == "auto" else self.lambda_,
        )

    def measure(self, site: Site, round: int) -> dict[str, Tensor | Rows]:
        squares = [block_sums(d.double().square()) for d in site.tasks]
        return {
            "opcm.squares": torch.stack(squares).cpu(),
            "opcm.total": block_sums(self._accumulated(site).square()).cpu(),
        }

    def digest(self, totals: Summary, round: int, summary: Summary) -> dict[str, Tensor]:
        norms = totals["opcm.squares"].sqrt()
        weights = torch.ones_like(norms)
        weights[0] = self._start[0]
        wanted, found = (norms * weights).sum() / weights.sum(), totals["opcm.total"].sqrt()
        factor = wanted / found if found > 0 else torch.zeros_like(found)
        return {"opcm.factor": factor, "opcm.merged": weights.sum()}

    def notes(self, summary: Summary) -> dict[str, Any]:
        factor = float(summary.get("opcm.factor", 0))
        return {"merged": int(summary["opcm.merged"]), "lambda": 1 / factor} if factor > 0 else {}

    def merge(self, site: Site) -> Tensor:
        assert site.base is not None
        factor = float(site.summary["opcm.factor"])
        return site.base + (self._accumulated(site) * factor).to(site.base.dtype)

    @property
    def _start(self) -> tuple[int, float]:
        """(models, lambda) of the first model."""
        return tuple(1 if value == "auto" else value for value in (self.merged, self.lambda_))  # type: ignore[return-value]

    def _accumulated(self, site: Site) -> Tensor:
        """A over all models, float64."""
        others = iter(site.tasks)
        total: Tensor = next(others).double() * self._start[1]
        projected = total.ndim == 2 and site.key.role != "embed"
        for delta in others:
            total = total + (_cleaned(delta.double(), total, self.alpha) if projected else delta.double())
        return total


def _cleaned(delta: Tensor, merged: Tensor, alpha: float) -> Tensor:
    """`delta` without the leading r x r block and the diagonal of its coordinates in `merged`'s singular bases."""
    u, s, v = top_svd(merged, min(merged.shape), NOISE)
    if not s.numel():
        return delta
    share = s.detach().cumsum(0) / s.detach().sum()
    rank = int((share <= alpha).sum())  # the index of the first share above alpha, as in the authors' code
    taken = u.T @ delta @ v
    mask = torch.eye(len(s), dtype=torch.bool, device=s.device)
    mask[:rank, :rank] = True
    occupied: Tensor = u @ torch.where(mask, taken, 0.0) @ v.T
    return delta - occupied
