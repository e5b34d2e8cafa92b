"""Gradient descent with a fixed number of steps: early stopping is part of the methods that use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["adam", "momentum_gain"]

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
"""Adam's constants; no reference implementation of a merging method uses others."""


def adam(gradient: Callable[[Tensor], Tensor], start: Tensor, steps: int, lr: float) -> Tensor:
    """Where `steps` steps of Adam lead from `start`; `gradient(x)` must return a new tensor.

    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, x <- x - lr m' / (sqrt(v') + eps), where m' and v' are
    divided by 1 - b^t (Kingma and Ba, ICLR 2015).  No entry moves by more than about lr per step, whatever the
    scale of g, unless g is as small as eps = 1e-8.
    """
    # position, first and second moment of the gradient
    x, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t in range(1, steps + 1):
        g = gradient(x)
        # In place throughout: of a matrix of 4096 x 4096 each temporary is 64 MB.
        m.lerp_(g, 1 - BETA1)
        v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        # g is not needed any more and lends its memory.  The biases of v and m are divided out here and in the last
        # line.
        step = torch.sqrt(v, out=g).div_((1 - BETA2**t) ** 0.5).add_(EPS)
        x.addcdiv_(m, step, value=-lr / (1 - BETA1**t))
    return x


def momentum_gain(values: Tensor, steps: int, lr: float, momentum: float) -> Tensor:
    """What `steps` steps of SGD with momentum do to a quadratic, by eigenvalue: h, shaped like `values`.

    For the loss sum_i l_i x_i^2 / 2 - g_i x_i and x = 0 at the start, the loop v <- momentum v + gradient,
    x <- x - lr v ends at x_i = h(l_i) g_i, because it never mixes eigenvectors.  For many small steps
    h(l) tends to 1 / l, and to 0 for none.
    """
    # x_i / g_i and v_i / g_i: the loop is linear in g, so one run for g = 1 serves every entry.
    gain, speed = torch.zeros_like(values), torch.zeros_like(values)
    for _ in range(steps):
        speed = speed * momentum + (1 - values * gain)  # -v; the gradient is l x - g
        gain = gain + speed * lr
    return gain
