"""AdamW with moments along any directions, for comparisons of what directions are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from weightsmith.train.optim.projector import tall

__all__ = ["RANK", "SubspaceAdamW", "Vectors", "leading"]

RANK = 16
Vectors = Callable[[Tensor, int], Tensor]
"""A gradient [n, N] and the number of a choice -> directions [N, RANK]."""


class SubspaceAdamW(torch.optim.Optimizer):
    """AdamW with the moments of matrices along any directions; of a group with `vectors` None in full."""

    def __init__(self, params: Any, lr: float, interval: int) -> None:
        super().__init__(params, {"lr": lr, "vectors": None, "interval": interval})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self._advance(p, self.state[p], group)

    def _advance(self, p: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        g = p.grad if group["vectors"] is None else tall(p.grad)
        step = state["step"] = state.get("step", 0) + 1
        if group["vectors"] is not None and (step - 1) % group["interval"] == 0:
            state["q"] = group["vectors"](g, (step - 1) // group["interval"])
        q = state.get("q")
        low = g if q is None else g @ q
        m = state.setdefault("m", torch.zeros_like(low)).lerp_(low, 0.1)
        v = state.setdefault("v", torch.zeros_like(low)).mul_(0.999).addcmul_(low, low, value=0.001)
        u = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        u = u if q is None else u @ q.T
        p.sub_(group["lr"] * (u if u.shape == p.shape else u.T))


def leading(g: Tensor, choice: int) -> Tensor:
    """GaLore's: leading right singular vectors."""
    return torch.linalg.svd(g, full_matrices=False)[2][:RANK].T
