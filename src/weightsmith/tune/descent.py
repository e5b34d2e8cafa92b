"""How the numbers move: optimizer, schedule, steps; and its state as tensors, for the journal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import RecipeError, did_you_mean

__all__ = ["Descent"]

_OPTIMIZERS = ("adam", "adamw", "sgd")
_SCHEDULES = ("constant", "cosine", "restarts")


@dataclass(frozen=True)
class Descent:
    """An optimizer of coefficients.

    optimizer    adam, adamw or sgd, as torch has them
    lr           learning rate
    steps        optimizer steps
    accumulate   batches per step where tasks take turns
    weight_decay of adamw; pulls coefficients to 0, that is to the base
    momentum     of sgd
    clip         largest norm of the gradient over all numbers; 0: none
    schedule     constant; cosine: to 0; restarts: cosine to lr / 10, begun again after 50, 150, 350, ... steps
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    steps: int = 500
    accumulate: int = 1
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip: float = 0.0
    schedule: str = "constant"

    def __post_init__(self) -> None:
        for what, value, known in (("optimizer", self.optimizer, _OPTIMIZERS), ("schedule", self.schedule, _SCHEDULES)):
            if value not in known:
                raise RecipeError(f"descent: {what} {value!r} is unknown{did_you_mean(value, known)}")
        for what, number, least in (("steps", self.steps, 0), ("accumulate", self.accumulate, 1)):
            if number < least:
                raise RecipeError(f"descent: {what} = {number} is below {least}")
        if not self.lr > 0:
            raise RecipeError(f"descent: lr = {self.lr:g} is not above 0")

    def optimizer_of(self, raw: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimizer, one group for each tensor."""
        groups: list[dict[str, Any]] = [{"params": [one]} for one in raw]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=self.lr, weight_decay=self.weight_decay, foreach=False)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * step / max(self.steps, 1)))
        length = 50
        while step >= length:
            step, length = step - length, 2 * length
        least = 0.1 * self.lr
        return least + (self.lr - least) * 0.5 * (1 + math.cos(math.pi * step / length))

    def step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Move once, along the gradients."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step)
        if self.clip:
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{i}.{name}": torch.as_tensor(v) for i, found in state.items() for name, v in found.items() if v is not None
    }


def restore(optimizer: torch.optim.Optimizer, found: Mapping[str, Tensor]) -> None:
    """Take the state back, bit for bit."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in found.items():
        place, _, name = key.partition(".")
        state.setdefault(int(place), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
