"""One network told what to do by channels that an operator of the task computes from each image (DocRes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.train.multitask.body import Body
from weightsmith.train.multitask.data import Answer, Pair, Task, Tasks
from weightsmith.train.multitask.priors import prior
from weightsmith.train.multitask.recipe import Conditioned
from weightsmith.train.multitask.system import System, targets

__all__ = ["PLANES", "ConditionedInputs", "widen"]

PLANES = 3
"""Channels of a prior."""


def widen(module: nn.Module, name: str, extra: int) -> None:
    """Give a convolution or linear layer of a module `extra` inputs more, with zero weights: its outputs stay.

    The new inputs come last.  Errors: RecipeError for a layer that is not there, grouped, or of another kind.
    """
    found = dict(module.named_modules()).get(name)
    if found is None:
        raise RecipeError(f"there is no module {name!r}{did_you_mean(name, [n for n, _ in module.named_modules()])}")
    if not isinstance(found, (nn.Conv2d, nn.Linear)) or getattr(found, "groups", 1) != 1:
        raise RecipeError(f"{name}: only Linear and Conv2d without groups can be widened, is {type(found).__name__}")
    old = found.weight
    zeros = old.new_zeros(old.shape[0], extra, *old.shape[2:])
    found.weight = nn.Parameter(torch.cat([old.detach(), zeros], 1), requires_grad=old.requires_grad)
    if isinstance(found, nn.Conv2d):
        found.in_channels += extra
    else:
        found.in_features += extra


class ConditionedInputs(System):
    """Images [3, H, W] and their prior [3, H, W] -> the task's map, from a network without parts per task.

    The network takes 6 channels, of which the last three have zero weights at first, and gives one kind of output.
    Controls: the prior `fixed` is a learned constant per task, `noise` random numbers, `none` zeros.
    """

    def __init__(self, body: Body, tasks: Tasks, given: Conditioned) -> None:
        super().__init__(body, tasks)
        for task in tasks.values():
            if task.kind != "map":
                raise RecipeError(
                    f"task {task.name!r} has {task.kind}s; by: conditioned is for tasks with maps (target)"
                )
        if body.loaded.config is not None:
            raise RecipeError("by: conditioned takes net:, or a module from Python that takes 6 channels")
        fixed = [name for name, task in tasks.items() if task.spec.prior == "fixed"]
        if fixed:
            self.fixed = fixed
            constants = nn.Parameter(torch.randn(len(fixed), PLANES, generator=torch.Generator().manual_seed(0)))
            self.own["fixed"] = nn.ParameterList([constants]).to(body.device)
        self._priors: dict[tuple[int, str], tuple[Pair, Tensor]] = {}

    def conditioned(self, task: Task, pairs: Sequence[Pair], by: str | None = None) -> Tensor:
        """The network's input [batch, 6, H, W]; `by` another prior than the task's."""
        name = by or task.spec.prior
        images = self.body.images([pair.input for pair in pairs])
        if name == "fixed":
            own: Any = self.own["fixed"]
            constants = own[0]
            planes = constants[self.fixed.index(task.name)][None, :, None, None].expand(
                len(pairs), -1, *images.shape[2:]
            )
        else:
            planes = torch.stack([self._prior(name, pair) for pair in pairs]).to(images.device)
        return torch.cat([images, planes], 1)

    def _prior(self, name: str, pair: Pair) -> Tensor:
        """Kept for each example: an operator takes longer than a step of a small network."""
        key = (id(pair), name)  # the pair is kept, too, so that its number stays its own
        if key not in self._priors:
            assert isinstance(pair.input, Tensor)
            self._priors[key] = (pair, prior(name, pair.input, seed=int(pair.input.double().sum() * 1e6) % (1 << 31)))
        return self._priors[key][1]

    def loss(self, task: Task, pairs: Sequence[Pair]) -> tuple[Tensor, int]:
        out = self.body.module(self.conditioned(task, pairs))
        target = targets(task, pairs, out)
        valid = task.counts(target)
        return l1_loss(out.float()[valid], target[valid], reduction="sum"), int(valid.sum())

    def predict(self, task: Task, pairs: Sequence[Pair], by: str | None = None) -> list[Answer]:
        return list(self.body.module(self.conditioned(task, pairs, by)).float().cpu())
