"""WUDI on leading singular directions, for experts of one multi-modal or language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import dims
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Whole, choice, integer, number
from weightsmith.core.site import Site
from weightsmith.methods.task_arithmetic import scaled_mean
from weightsmith.ops.combine import mean
from weightsmith.ops.descent import adam, momentum_gain
from weightsmith.ops.interference import Interference, frobenius, interference, start_of
from weightsmith.ops.length import Scaled
from weightsmith.ops.spectral import top_svd

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Optmerge"]

DEFAULTS = {"full": ("adam", 1e-5, "sum"), "lora": ("sgd", 1e-4, "mean")}
"""Variant -> optimizer, learning rate and start of the authors' scripts."""


@dataclass(frozen=True)
class Optmerge(
    Whole,
    Scaled,
    name="optmerge",
    aliases=("wudi2",),
    needs=(BASE,),
    checks=(dims(2),),
    otherwise=scaled_mean,
    apart=True,
):
    """Find the low-rank change that disturbs the experts least, by gradient descent.

    It lowers sum_i |(M - T_i) R_i^T|^2 / |tau_i|^2, R_i and T_i being of rank k = min(m, n) // number of tasks.
    R_i = S_k V_k^T of tau_i's k leading singular triplets.  variant full (experts fine-tuned as a whole):
    T_i = mean + the rank-k part of tau_i - mean; lora (adapters, seen as whole matrices): T_i = the rank-k part of
    tau_i.  Where a parameter is auto, full means Adam with lr 1e-5 from the sum of task vectors, lora SGD with
    lr 1e-4 from their mean.  Result: base + scaling M; tensors that are not matrices get base + scaling mean(tau).

    Adam's lr is absolute (no entry moves by more than about iters * lr), SGD's relative to the task vectors.
    SGD is not iterated over matrices: its end is known from the eigenvalues of a Gram matrix.  The authors leave
    out vision tower, projector, embeddings, head, norms and biases; say so by `exclude`.  The sum is about n times
    as large as the mean, so full wants a smaller `scaling` on large fine-tunes (0.1 was used).
    With Adam, gradients to the experts pass through the start alone.
    """

    paper = "OptMerge (Wei et al., ICLR 2026), arXiv:2505.19892"

    variant: str = choice("full", "how the experts were made", "full", "lora")
    optimizer: str = choice("auto", "how the loss is lowered", "auto", "adam", "sgd")
    init: str = choice("auto", "where M starts", "auto", "sum", "mean")
    iters: int = integer(300, "steps", low=0)
    lr: float | str = number("auto", "learning rate", above=0, options=("auto",))
    momentum: float = number(0.9, "share of its speed that SGD keeps per step", low=0, below=1)
    scaling: float = number(1.0, "factor of the merged task vector", smooth=True)

    def merged(self, site: Site) -> Tensor:
        deltas = site.deltas
        start = start_of(deltas, self._setting("init", 2))
        # The descent works on the difference to M0, whose numbers are small and exact in float32.
        return start + self._moved(start, deltas)

    def _setting(self, field: str, place: int) -> str:
        given = str(getattr(self, field))
        return str(DEFAULTS[self.variant][place]) if given == "auto" else given

    def _moved(self, start: Tensor, deltas: Tensor) -> Tensor:
        """M - M0."""
        # Ranks of all tasks add up to at most the matrix's.
        rank = min(start.shape) // len(deltas)
        lr, by_adam = float(self._setting("lr", 1)), self._setting("optimizer", 0) == "adam"
        # Adam divides by running moments: it mixes eigenvectors, and has to be run step by step.
        if by_adam:
            with torch.no_grad():
                gradient = self._loss(start, deltas, rank, loop=True).gradient(start.dtype)
                return adam(gradient, torch.zeros_like(start), self.iters, lr)
        # SGD does not: 300 steps are one function of the eigenvalues (`ops.descent.momentum_gain`).
        loss = self._loss(start, deltas, rank, loop=False)
        # The quadratic's second derivative is 2 C, its first at the start -2 E.
        return loss.filtered(lambda values: 2 * momentum_gain(2 * values, self.iters, lr, self.momentum)).to(
            start.dtype
        )

    def _loss(self, start: Tensor, deltas: Tensor, rank: int, *, loop: bool) -> Interference:
        # The mean stays whole for full fine-tunes; task vectors of LoRA are cut as they are.
        centre = mean(deltas).double() if self.variant == "full" else None
        tasks = (_task(delta, centre, rank) for delta in deltas)
        return interference(start, tasks, rank * len(deltas), loop=loop)


def _task(delta: Tensor, centre: Tensor | None, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """T_i, R_i and |tau_i| of one task; singular vectors count as constants to gradients."""
    tau = delta.double()
    leading = top_svd(delta.detach(), rank)
    projector = leading.s[:, None] * leading.v.T  # R_i = S V^T: [r, n]
    if centre is None:
        # T_i: the task vector within its leading right singular space.
        return (tau @ leading.v) @ leading.v.T, projector, frobenius(delta)
    del leading  # float64 matrices: let go of them before the second decomposition
    rest = tau - centre
    v = top_svd(rest.detach().to(delta.dtype), rank).v
    # T_i: the mean, and of what is beyond it the leading directions.
    return centre + (rest @ v) @ v.T, projector, frobenius(delta)
