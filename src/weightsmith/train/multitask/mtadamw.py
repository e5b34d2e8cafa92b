"""Task-balanced AdamW, for steps whose gradients come from one task each (Uni-Perceiver v2, arXiv 2211.09808)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from weightsmith.core.errors import RecipeError
from weightsmith.train.multitask.sampler import LOW

__all__ = ["MTAdamW"]


class MTAdamW(Optimizer):
    """AdamW on normalised gradients, corrected for how often each task is drawn:

        g <- w_k g / |g|        m <- b1 m + (1 - b1) g / s_k        n <- b2 n + (1 - b2) g^2 / s_k

    so that in the mean of steps the rate s_k drops out and the weight w_k alone says how much a task pulls.  A
    reconstruction from the paper's formulae; its code is not public.

        optimizer.step(task="a", rate=0.3, weight=1.0)

    grad_norm  global: over all parameters with a gradient, in float32; none: gradients as they are
    max_inv_s  most that 1/s_k multiplies g^2 with

    Parameters without a gradient (another task's head) stay, with their own step counter.  A gradient that is zero or
    not finite skips the step; `skipped` counts these by task.  With one task of rate 1 and weight |g| it is AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        *,
        grad_norm: Literal["global", "none"] = "global",
        max_inv_s: float = 100.0,
    ) -> None:
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas) or max_inv_s < 1:
            raise RecipeError("MTAdamW needs lr, weight_decay >= 0, eps > 0, betas in [0, 1) and max_inv_s >= 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.grad_norm, self.max_inv_s = grad_norm, max_inv_s
        self.skipped: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """torch leaves out what it does not know when an optimizer is copied or pickled."""
        own = {name: getattr(self, name) for name in ("grad_norm", "max_inv_s", "skipped")}
        return {**super().__getstate__(), **own}

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, task: str = "", rate: float = 1.0, weight: float = 1.0
    ) -> Any:
        """One step on the gradients of a task that is drawn at this rate."""
        if not 0 < rate <= 1 or not weight > 0:
            raise RecipeError(f"task {task!r}: rate must be in (0, 1] and weight above 0, got {rate:g} and {weight:g}")
        if rate < LOW:
            warnings.warn(f"task {task!r}: a rate of {rate:g} makes its gradients spike", stacklevel=2)
        found = None
        if closure is not None:
            with torch.enable_grad():
                found = closure()
        grads = [p.grad.float() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item() if grads else 0.0
        if not 0 < norm < float("inf"):
            self.skipped[task] = self.skipped.get(task, 0) + 1
            return found
        scale = weight / max(norm, 1e-12) if self.grad_norm == "global" else weight
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._advance(p, p.grad.float() * scale, 1 / rate, group)
        return found

    def _advance(self, p: Tensor, g: Tensor, inverse: float, group: dict[str, Any]) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        state["step"] += 1
        count, m, n = float(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        m.mul_(b1).add_(g, alpha=(1 - b1) * inverse)
        n.mul_(b2).addcmul_(g, g, value=(1 - b2) * min(inverse, self.max_inv_s))
        p.mul_(1 - group["lr"] * group["weight_decay"])  # decay is not divided by the rate
        denominator = (n / (1 - b2**count)).sqrt_().add_(group["eps"])
        p.add_((m / (1 - b1**count) / denominator).to(p.dtype), alpha=-group["lr"])
