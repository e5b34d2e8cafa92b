"""Add models one after another, each cleaned of what is merged already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Found, Method, Pass, Scope, Stage, Whole, number
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.ops.leading import LARGE, eigh, gram
from weightsmith.ops.reduce import block_squares, block_sums
from weightsmith.ops.spectral import NOISE, Svd, top_svd

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Opcm"]


@dataclass(frozen=True)
class Opcm(Whole, Method, name="opcm", needs=(BASE,), streams=1):
    """Add one change after another, each without the directions that are already in use.

    In recipe order, from A = tau_1, for t = 2, 3, ...: A = U S V^T, r = number of leading singular values up to the
    one whose cumulative share of their sum exceeds alpha, that one left out; from U^T tau_t V take away the
    leading r x r block and the diagonal; A <- A + what is left of tau_t.  Tensors that are no matrices and
    embeddings are added as they are.  Result: base + A mean_i |tau_i| / |A|, norms over the whole model.

    To add models to an earlier merge without its experts, give that merge as the first model: it holds `merged` models
    and A is `lambda` times its task vector.  auto reads both from what its run noted in weightsmith.json.
    The diagonal is removed up to 1e-6 of the largest singular value (the authors' code goes on into directions that
    are rounding noise).  For matrices of 256 or more rows and columns |A| is found in float32, up to 1e-4 of it.
    No order but the recipe's: the authors shuffle.
    """

    paper = "OPCM (Tang et al., NeurIPS 2025), arXiv:2501.09522"

    alpha: float = number(0.5, "share of the merged spectrum that counts as occupied", low=0, below=1)
    merged: float | str = number(
        "auto", "models that the first one holds, if it is an earlier merge", low=1, options=("auto",), kind="integer"
    )
    lambda_: float | str = number(
        "auto", "scale of that earlier merge, from its weightsmith.json", above=0, options=("auto",)
    )

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        # The result is scaled by a norm over the model, so A is formed twice: once for its norm, once for the result.
        return (_Norms(self, scope=Scope.MODEL),)

    def informed(self, key: Key, notes: Mapping[str, Mapping[str, Any]]) -> Stage:
        """With what the first model's run noted, where that was this method."""
        earlier = notes.get("earlier", {}).get(self.name, {})
        return replace(
            self,
            merged=earlier.get("merged", 1) if self.merged == "auto" else self.merged,
            lambda_=earlier.get("lambda", 1.0) if self.lambda_ == "auto" else self.lambda_,
        )

    def says(self, told: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Iterator[str]:
        first = next(iter(told.values()))
        for i, name in enumerate(names):
            if first[f"opcm.norm.{i}"] == 0:
                yield f"{name} is equal to the base: its norm of 0 lowers the mean that the result is scaled to"

    def notes(self, found: Found) -> dict[str, Any]:
        norms = next(iter(found.values()), None)
        # 1 / factor: the result is base + factor A, so A is that times its task vector.
        return {} if norms is None or norms.factor <= 0 else {"merged": norms.merged, "lambda": 1 / norms.factor}

    def merge(self, site: Site) -> Tensor:
        assert site.base is not None
        factor = site.result(_Norms(self, scope=Scope.MODEL)).factor
        return site.base + (self.accumulated(site, site.tasks) * factor).to(site.base.dtype)

    @property
    def start(self) -> tuple[int, float]:
        """(models, lambda) of the first model."""
        return tuple(1 if value == "auto" else value for value in (self.merged, self.lambda_))  # type: ignore[return-value]

    def accumulated(self, site: Site, tasks: Iterable[Tensor], norm: bool = False) -> Tensor:
        """A over all models, float64.  `norm`: wanted for its norm alone."""
        # One task vector at a time: A and one more, however many experts there are.
        others = iter(tasks)
        total: Tensor = next(others).double() * self.start[1]
        # An embedding is tall and each row a token's: the authors add it as it is.
        projected = total.ndim == 2 and site.key.role != "embed"
        for delta in others:
            total = total + (_cleaned(delta, total, self.alpha, norm) if projected else delta.double())
        return total


class _Scale(NamedTuple):
    """Norms of the task vectors over the model, the factor that gives the merged one their mean, models merged."""

    norms: tuple[float, ...]
    factor: float
    merged: int


@dataclass(frozen=True)
class _Norms(Pass[_Scale]):
    method: Opcm

    def see(self, site: Site) -> State:
        squares: list[Tensor] = []

        def seen() -> Iterator[Tensor]:
            # Their norms are taken on the way: a second walk would read every expert again.
            for delta in site.tasks:
                squares.append(block_squares(delta))
                yield delta

        total = self.method.accumulated(site, seen(), norm=True)
        return {"squares": torch.stack(squares).cpu(), "total": block_sums(total.square()).cpu()}

    def tells(self, result: _Scale) -> Mapping[str, float]:
        return {f"opcm.norm.{i}": norm for i, norm in enumerate(result.norms)}

    def end(self, total: Mapping[str, Any]) -> _Scale:
        norms = total["squares"].sqrt()
        # An earlier merge counts as the models that it holds.
        weights = torch.ones_like(norms)
        weights[0] = self.method.start[0]
        # float64 scalars: the merged task vector gets the mean norm of the models'.
        wanted, found = (norms * weights).sum() / weights.sum(), total["total"].sqrt()
        factor = wanted / found if found > 0 else torch.zeros_like(found)
        return _Scale(tuple(norms.tolist()), float(factor), int(weights.sum()))


def _cleaned(delta: Tensor, merged: Tensor, alpha: float, norm: bool) -> Tensor:
    """`delta` without the leading r x r block and the diagonal of its coordinates in `merged`'s singular bases.

    Products with a float32 task vector of a large matrix are float32: they are 1e-6 of it off, as much as it is off
    itself.  The bases are float64.  From a Gram matrix in float32 the weak ones are so far astray that 5 % of what is
    cleaned away is another part of the diagonal, though as much of it: for the `norm` (5e-5 off) that is enough.
    """
    large = delta.dtype == torch.float32 and min(delta.shape) >= LARGE and not merged.requires_grad
    u, s, v = _rough_bases(merged) if large and norm else top_svd(merged, min(merged.shape), NOISE)
    if not s.numel():
        return delta.double()
    share = s.detach().cumsum(0) / s.detach().sum()  # [k], rising to 1
    rank = int((share <= alpha).sum())  # the index of the first share above alpha, as in the authors' code
    dtype = delta.dtype if large else torch.float64
    u, v, wide = u.to(dtype), v.to(dtype), delta.to(dtype)
    image = wide @ v  # [m, k]: tau V
    # U (what of U^T tau V is taken away): the leading block whole, then the diagonal. [m, k]
    occupied = torch.cat([u[:, :rank] @ (u[:, :rank].T @ image[:, :rank]), u[:, rank:] * (u * image).sum(0)[rank:]], 1)
    return wide.double() - (occupied @ v.T).double()


def _rough_bases(merged: Tensor) -> Svd:
    """The singular triplets of a float64 matrix above rounding noise, in float32; s but for a common factor."""
    wide = merged.shape[0] <= merged.shape[1]
    # Divided by the largest entry: float32 squares of small task vectors would vanish.
    short = (merged if wide else merged.T) / merged.abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    short = short.float()
    # [p, p], strongest first
    u = eigh(gram(short))[1].flip(1)
    image = short.T @ u
    # The lengths of A^T u_i are better than roots of eigenvalues, which have half the digits.
    s = image.norm(dim=0)
    kept = s > NOISE * s.max()
    u, s, v = u[:, kept], s[kept], image[:, kept] / s[kept]
    return Svd(u, s, v) if wide else Svd(v, s, u)
