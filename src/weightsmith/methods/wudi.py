"""Move the sum of task vectors to where it disturbs no task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.checks import dims
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Whole, integer, number
from weightsmith.core.site import Site
from weightsmith.methods.task_arithmetic import scaled_mean
from weightsmith.ops.descent import adam
from weightsmith.ops.interference import frobenius, interference, start_of
from weightsmith.ops.length import Scaled

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Wudi"]


@dataclass(frozen=True)
class Wudi(Whole, Scaled, name="wudi", needs=(BASE,), checks=(dims(2),), otherwise=scaled_mean, apart=True):
    """Find the change that disturbs the experts least, by gradient descent.

    From the sum M of the task vectors, Adam lowers sum_i |(M - tau_i) tau_i^T|^2 / |tau_i|^2.
    A task vector's rows lie roughly in the space of its task's inputs, so (M - tau_i) tau_i^T says how much M
    disturbs task i there.  Result: base + scaling M; tensors that are not matrices get base + scaling mean(tau).

    Few steps are the regulariser: the authors report the best scores at 300 to 500 steps and lower ones nearer to
    the minimum.  `lr` is absolute: no entry moves by more than about iters * lr (3e-3), whatever the size of the
    task vectors.  M is about n times as large as one task vector; where that is too much, lower `scaling`.
    Leave out embeddings and head by `exclude`.  A step is one product with the n x n Gram matrix, whatever the
    number of tasks.  A task vector of zeros has no say.  Gradients to the experts pass through the start alone.
    """

    paper = "Whoever Started the Interference Should End It (Cheng et al., ICML 2025), arXiv:2503.08099"

    iters: int = integer(300, "steps of Adam", low=0)
    lr: float = number(1e-5, "learning rate: about the most an entry moves per step", above=0)
    scaling: float = number(1.0, "factor of the merged task vector", smooth=True)

    def merged(self, site: Site) -> Tensor:
        deltas = site.deltas
        # The authors start at task arithmetic with lambda 1.
        start = start_of(deltas, "sum")
        # The descent counts as a constant: gradients reach the start only.
        return start + self._moved(start.detach(), deltas.detach())

    def _moved(self, start: Tensor, deltas: Tensor) -> Tensor:
        # T_i = R_i = tau_i: a task vector stands for the inputs that its layer was trained on.
        tasks = ((delta, delta, frobenius(delta)) for delta in deltas)
        with torch.no_grad():
            # No name for the loss: its float64 matrices would live on beside the float32 ones of the loop.
            gradient = interference(start, tasks, start.shape[0] * len(deltas), loop=True).gradient(start.dtype)
            return adam(gradient, torch.zeros_like(start), self.iters, self.lr)
