"""What the low-rank optimizers share: which parameters are projected, AdamW for the others, exact state files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.train.optim.bases import basis
from weightsmith.train.optim.projector import Projector, working

__all__ = [
    "Group",
    "LowRankOptimizer",
    "adamw",
    "check_group",
    "gradient",
    "is_projected",
    "matrix",
    "moved",
    "projector_of",
]

Group = Mapping[str, Any]


def matrix(tensor: Tensor) -> Tensor:
    """A parameter or gradient as a matrix: kernels of convolutions are [out, everything else]."""
    return tensor if tensor.ndim == 2 else tensor.flatten(1)


def is_projected(shape: torch.Size, group: Group) -> bool:
    """Matrices are, but those with a side of `max_size` or more, and all of a group with rank None."""
    if len(shape) < 2 or group["rank"] is None:
        return False
    return bool(max(shape[0], shape[1:].numel()) < group["max_size"])


def projector_of(group: Group) -> Projector:
    return Projector(group["rank"], group["basis"], group["norm"], group["fft"])


def check_group(group: Group) -> None:
    """Refuse values and shapes that a param group cannot have; rank None means AdamW and is always right."""
    problems = [
        f"{name} must be {range_}, got {value!r}"
        for name, range_, value, right in [
            ("lr", "at least 0", group["lr"], float(group["lr"]) >= 0),
            ("eps", "above 0", group["eps"], group["eps"] > 0),
            ("weight_decay", "at least 0", group["weight_decay"], group["weight_decay"] >= 0),
            ("betas", "two numbers in [0, 1)", group["betas"], all(0 <= beta < 1 for beta in group["betas"])),
        ]
        if not right
    ]
    if problems:
        raise RecipeError(*problems)
    if group["rank"] is None:
        return
    rank = projector_of(group).rank
    names = group.get("param_names") or ["a parameter"] * len(group["params"])
    small = [
        f"rank {rank} exceeds the smaller side of {name} {list(p.shape)}: lower it, or give such parameters "
        "a param group with rank=None (plain AdamW)"
        for name, p in zip(names, group["params"], strict=True)
        if is_projected(p.shape, group) and rank > min(p.shape[0], p.shape[1:].numel())
    ]
    if small:
        raise PlanError(small)


def gradient(p: Tensor) -> Tensor:
    """A parameter's gradient, in the dtype of the arithmetic; the user's own tensor is only read."""
    assert p.grad is not None
    if p.grad.is_sparse:
        raise PlanError([f"low-rank optimizers take no sparse gradients (a parameter {list(p.shape)} has one)"])
    return p.grad.to(working(p.dtype))


def moved(m: Tensor, v: Tensor, g: Tensor, step: int, group: Group) -> tuple[Tensor, float]:
    """AdamW's direction and its length: update the moments by g, all of one shape.

    m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2; direction m / (sqrt(v) + eps c), length lr c / (1 - b1^t) with
    c = sqrt(1 - b2^t), which is AdamW with bias correction (Loshchilov and Hutter, ICLR 2019).
    """
    beta1, beta2 = group["betas"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    correction = sqrt(1 - beta2**step)
    root = v.sqrt().add_(group["eps"] * correction)
    return torch.div(m, root, out=root), correction / (1 - beta1**step)


def adamw(p: Tensor, state: dict[str, Any], group: Group, lr: float) -> None:
    """One step of plain AdamW, for vectors, embeddings and heads; decay is the caller's."""
    g = gradient(p)
    if "m" not in state:
        state |= {"m": torch.zeros_like(g), "v": torch.zeros_like(g)}
    direction, length = moved(state["m"], state["v"], g, int(state["step"]), group)
    p.add_(direction, alpha=-lr * length)


class LowRankOptimizer(Optimizer):
    """Steps matrices by their own rule and all else by AdamW, with decoupled decay; state dicts are exact."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self._bases: dict[tuple[Any, ...], Tensor] = {}  # keeps the shared bases alive

    def __setstate__(self, state: dict[str, Any]) -> None:
        """torch copies and pickles an optimizer without fields of its own; bases are found again."""
        super().__setstate__(state)
        self.__dict__.setdefault("_bases", {})

    def hold(self, projector: Projector, rows: Tensor) -> None:
        """Keep the basis that a projector uses on a matrix [n, N] as long as the optimizer lives."""
        key = (projector.basis, rows.shape[1], rows.dtype, rows.device)
        if key not in self._bases:
            self._bases[key] = basis(*key)

    @abstractmethod
    def rate(self, group: Group, projected: bool) -> float:
        """The learning rate of matrices, or of what AdamW steps."""

    @abstractmethod
    def project(self, p: Tensor, state: dict[str, Any], group: Group, lr: float) -> None:
        """One step of a matrix; decay is done."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns, which is called first and with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", torch.zeros(())) + 1
                    projected = is_projected(p.shape, group)
                    lr = self.rate(group, projected)
                    if group["weight_decay"]:
                        p.mul_(1 - lr * group["weight_decay"])
                    if projected:
                        self.project(p, state, group, lr)
                    else:
                        adamw(p, state, group, lr)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the saved state back as it was.

        torch's own casts every tensor to the dtype of its parameter, which would round float32 moments of bfloat16
        parameters and turn indices into floats.
        """
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and key != "step":
                    self.state[p][key] = value.detach().clone().to(p.device)
