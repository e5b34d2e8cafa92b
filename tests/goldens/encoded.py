"""Compressing tensors in memory, with the engine that writes folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from weightsmith.core.task import BLOCK
from weightsmith.engine.carry import carry_out
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import MemorySource
from weightsmith.io.write.sink import MemorySink
from weightsmith.ops.masks import unpack_bits
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.recipe.schema import Recipe

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Encoded:
    """The stored tensors of a compressed folder."""

    plan: Plan
    tensors: dict[str, Tensor]

    def mask(self, name: str, expert: str) -> Tensor:
        tau = self.tensors[f"{name}::tau"]
        return unpack_bits(self.tensors[f"{name}::mask.{expert}"], 0, tau.numel()).reshape(tau.shape)

    def rebuilt(self, name: str, expert: str, base: Tensor) -> Tensor:
        task = next(t for t in self.plan.tasks if t.key.name == name)
        own = {p.name: self.tensors[p.key.name] for p in task.encoded if p.expert in ("", expert)}
        parts = {n: t.to(base.dtype) if t.is_floating_point() else t for n, t in own.items()}
        return task.pipeline.codec.decode(parts, base, 0)

    @property
    def numel(self) -> int:
        return sum(t.numel() for t in self.tensors.values())


def recipe_of(method: Any, experts: Sequence[str], **more: Any) -> Recipe:
    stages = method if isinstance(method, list) else [method]
    models = {name: {"model": name} for name in experts}
    return Recipe.model_validate({"base": {"model": "base"}, "models": models, "method": tuple(stages), **more})


def encoded(
    method: Any,
    base: State,
    experts: Mapping[str, State],
    block: int = BLOCK,
    stats: Mapping[str, Mapping[str, State]] | None = None,
    **more: Any,
) -> Encoded:
    """`stats`: statistic -> model -> tensors."""
    recipe = recipe_of(method, list(experts), **more)
    measured = {s: {n: MemorySource(t, f"{s} of {n}") for n, t in found.items()} for s, found in (stats or {}).items()}
    inputs = Inputs(MemorySource(base, "base"), {n: MemorySource(t, n) for n, t in experts.items()}, measured)
    plan = make_plan(recipe, sources=inputs, threads=1, encode=True)
    sink = MemorySink()
    carry_out(plan, inputs, sink, block=block)
    return Encoded(plan, sink.tensors())
