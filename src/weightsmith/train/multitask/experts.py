"""TaskExpert: shared experts, a gate for each task and token, and a memory carried over the levels (arXiv 2307.15324).

A reconstruction from the published method; its code is not public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.core.errors import RecipeError
from weightsmith.train.multitask.body import Body, Hidden, frozen
from weightsmith.train.multitask.data import Answer, Pair, Task, Tasks
from weightsmith.train.multitask.recipe import TaskExpert
from weightsmith.train.multitask.system import Heads, System, head_answers, head_loss

__all__ = ["Experts", "TaskExpertDecoder"]

_COLLAPSED = 0.1  # share of the largest entropy below which a gate's mean gets a bonus
_BONUS = 1e-3


class TaskExpertDecoder(nn.Module):
    """Hidden states of several levels [batch, n, d] -> a feature per task [batch, n, width].

    At each level  X_e = GELU(f_e(F)),  a = softmax(G_t([F; mean F; M])) over experts and memory,
    Z = sum_e a_e X_e + a_memory W M,  M <- LayerNorm(M + U([Z; M])).  The last M is the task's feature.
    Gates start at zero: everything counts alike.

    d, tasks, experts, levels, width   default width: d // 2
    gate    static: one learned mixture per task and level, whatever the input
    memory  without it the feature is Z of the last level
    context the gate sees the mean of all tokens, too
    outside the experts' outputs come from elsewhere, with every call: other models' hidden states
    """

    def __init__(
        self,
        d: int,
        tasks: Sequence[str],
        experts: int = 5,
        levels: int = 4,
        width: int | None = None,
        *,
        gate: Literal["dynamic", "static"] = "dynamic",
        memory: bool = True,
        context: bool = True,
        outside: bool = False,
    ) -> None:
        super().__init__()
        width = width or max(1, d // 2)
        if min(d, experts, levels, width) < 1 or not tasks or len(set(tasks)) < len(tasks):
            raise RecipeError("TaskExpertDecoder needs different tasks, and d, experts, levels, width of at least 1")
        self.names, self.width, self.memory, self.context, self.dynamic = (
            list(tasks),
            width,
            memory,
            context,
            gate == "dynamic",
        )
        self.levels, self.outside = levels, outside
        if not outside:
            self.experts = nn.ModuleList(
                nn.ModuleList(nn.Sequential(nn.Linear(d, width), nn.GELU()) for _ in range(experts))
                for _ in range(levels)
            )
        mixed, seen = experts + memory, d * (1 + context) + width * memory
        hidden = max(1, d // 4)

        def gates() -> nn.Module:
            last = nn.Linear(hidden, mixed)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            return nn.Sequential(nn.Linear(seen, hidden), nn.GELU(), last)

        n = len(tasks)
        if self.dynamic:
            self.gates = nn.ModuleList(nn.ModuleList(gates() for _ in range(n)) for _ in range(levels))
        else:
            self.mixtures = nn.Parameter(torch.zeros(levels, n, mixed))
        if memory:
            self.start = nn.Parameter(nn.init.trunc_normal_(torch.empty(n, width), std=0.02))
            self.carry = nn.ModuleList(nn.Linear(width, width) for _ in range(levels))
            self.update = nn.ModuleList(
                nn.ModuleList(nn.Linear(2 * width, width) for _ in range(n)) for _ in range(levels)
            )
            self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(width) for _ in range(n)) for _ in range(levels))

    def forward(
        self,
        levels: Sequence[Tensor],
        task: str,
        mask: Tensor | None = None,
        outputs: Sequence[Sequence[Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The task's feature, and its gates [levels, batch, n, experts (+ 1 of the memory)], which sum to one.

        outputs  of the experts [levels][experts], each [batch, n, width], where they come from outside
        """
        if len(levels) != self.levels or (outputs is None) == self.outside:
            raise RecipeError(f"the decoder reads {self.levels} levels, got {len(levels)}; outputs: {self.outside}")
        t, seen = self.names.index(task), []
        z = m = self.start[t].expand(*levels[0].shape[:-1], -1) if self.memory else None
        for level, features in enumerate(levels):
            if m is not None and m.shape[1] != features.shape[1]:
                m = resized(m, features.shape[1])
            own_experts: Any = () if self.outside else self.experts[level]
            parts = [*outputs[level]] if outputs is not None else [expert(features) for expert in own_experts]
            if m is not None:
                parts = [*parts, self.carry[level](m)]
            a = self._gate(level, t, features, m, mask)
            seen.append(a)
            z = (torch.stack(parts, -1) * a.unsqueeze(-2)).sum(-1)
            if m is not None:
                own: Any = self.update[level]
                norms: Any = self.norms[level]
                m = norms[t](m + own[t](torch.cat([z, m], -1)))
        out = m if m is not None else z
        assert out is not None
        return out, torch.stack(seen) if len({a.shape for a in seen}) == 1 else seen[-1][None]

    def _gate(self, level: int, t: int, features: Tensor, m: Tensor | None, mask: Tensor | None) -> Tensor:
        if not self.dynamic:
            return self.mixtures[level, t].softmax(-1).expand(*features.shape[:-1], -1)
        seen = [features]
        if self.context:
            seen.append(Hidden([features], mask).pooled().unsqueeze(1).expand_as(features))
        if m is not None:
            seen.append(m)
        own: Any = self.gates[level]
        a: Tensor = own[t](torch.cat(seen, -1)).softmax(-1)
        return a

    def bonus(self, gates: Tensor) -> Tensor:
        """What to subtract from the loss where gates have collapsed to one expert; else 0."""
        entropy = -(gates * gates.clamp_min(1e-9).log()).sum(-1).mean()
        most = math.log(max(gates.shape[-1], 2))
        return _BONUS * entropy if entropy.item() < _COLLAPSED * most else entropy.new_zeros(())


def resized(memory: Tensor, count: int) -> Tensor:
    """Memory tokens of square maps at another resolution, bilinearly."""
    old, new = math.isqrt(memory.shape[1]), math.isqrt(count)
    if old * old != memory.shape[1] or new * new != count:
        raise RecipeError(f"levels of {memory.shape[1]} and {count} tokens; only square maps can be resized")
    square = memory.transpose(1, 2).reshape(len(memory), -1, old, old)
    return torch.nn.functional.interpolate(square, (new, new), mode="bilinear").flatten(2).transpose(1, 2)


class Experts(System):
    """The decoder on the shared model's hidden states, with a head for each task.

    With `init_experts_from` each expert is one fine-tuned model, whole and frozen: at every level it gives that model's
    hidden states, and gates, memory and heads are what trains: a learned router to compare static merges with.
    """

    def __init__(self, body: Body, tasks: Tasks, given: TaskExpert, others: Sequence[Body] = ()) -> None:
        super().__init__(body, tasks)
        probe = body.probe(next(iter(tasks.values()))).levels
        self.reads = _spread(len(probe), given.levels)
        d, count = probe[-1].shape[-1], len(others) or given.experts
        levels = len(self.reads)
        self.others = list(others)
        width = d if others else given.width
        if others:
            for other in others:
                frozen(other.module)
                shape = other.probe(next(iter(tasks.values()))).levels
                if len(shape) != len(probe) or shape[-1].shape[-1] != d:
                    raise RecipeError(
                        f"init_experts_from: {other.loaded.label} has other layers than {body.loaded.label}"
                    )
        if others or given.freeze:
            frozen(body.module)
            self.trains_base = False
        decoder = TaskExpertDecoder(
            d, list(tasks), count, levels, width, gate=given.gate, memory=given.memory, outside=bool(others)
        )
        self.own["decoder"] = decoder.to(body.device)
        self.own["heads"] = Heads(tasks, decoder.width, "by: task_expert").to(body.device)
        self._shares: dict[str, list[Tensor]] = {}

    def _out(self, task: Task, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        inputs = [pair.input for pair in pairs]
        found = self.body.hidden(inputs)
        decoder: Any = self.own["decoder"]
        levels = [found.levels[i] for i in self.reads]
        outputs = None
        if self.others:
            with torch.no_grad():
                seen = [other.hidden(inputs).levels for other in self.others]
            outputs = [[own[i] for own in seen] for i in self.reads]
        feature, gates = decoder(levels, task.name, found.mask, outputs)
        if not torch.is_grad_enabled():
            self._shares.setdefault(task.name, [])[:] = [gates.mean((0, 1, 2)).cpu()]
        return self.own["heads"](task, feature, found.mask, found.grid), gates

    def loss(self, task: Task, pairs: Sequence[Pair]) -> tuple[Tensor, int]:
        out, gates = self._out(task, pairs)
        value, count = head_loss(task, out, pairs)
        return value - count * self.own["decoder"].bonus(gates), count  # type: ignore[operator]

    def predict(self, task: Task, pairs: Sequence[Pair]) -> list[Answer]:
        return head_answers(task, self._out(task, pairs)[0])

    def told(self) -> Mapping[str, Any]:
        """Mean gates of each task, of the last examples it was scored on; the memory's share is the last."""
        return {"gates": {name: [round(float(x), 4) for x in own[-1]] for name, own in self._shares.items()}}


def _spread(count: int, wanted: int) -> list[int]:
    """Numbers of the levels that are read: the last, and others at even distances."""
    n = min(count, wanted)
    return [round((i + 1) * count / n) - 1 for i in range(n)]
