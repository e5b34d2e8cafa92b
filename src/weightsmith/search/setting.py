"""From SEARCH.yaml to its parts: the space, the goals, the sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.core.errors import PlanError, RecipeError, did_you_mean
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.inputs.opened import Inputs
from weightsmith.recipe.check import stages_written
from weightsmith.recipe.schema import Recipe
from weightsmith.search.evolve import EvolveSpace
from weightsmith.search.genes import Gene
from weightsmith.search.samplers.base import Sampler
from weightsmith.search.samplers.by_gradient import FrankWolfe, PoolSpace
from weightsmith.search.samplers.known import SAMPLERS
from weightsmith.search.schema import Genes, SearchFile
from weightsmith.search.score import Scored
from weightsmith.search.space import (
    REST,
    Entry,
    Members,
    RecipeSpace,
    Slots,
    Space,
    blocks_in_groups,
    check_where,
)

__all__ = ["Aim", "sampler_of", "space_of"]


@dataclass(frozen=True)
class Aim:
    """What is better.

    goals    score -> max or min
    weights  of one number that is maximised: sum of weight * score, with the sign of the goal; None: of all goals a
             front
    """

    goals: Mapping[str, str]
    weights: Mapping[str, float] | None

    @classmethod
    def of(cls, file: SearchFile) -> Aim:
        goals = file.aims
        if file.front:
            return cls(goals, None)
        weights = file.weights or dict.fromkeys(goals, 1 / len(goals))
        return cls(goals, {name: weights.get(name, 0.0) for name in goals})

    @property
    def names(self) -> tuple[str, ...]:
        """What is maximised: the goals, or 'score'."""
        return tuple(self.goals) if self.weights is None else ("score",)

    def sign(self, name: str) -> float:
        return 1.0 if self.goals[name] == "max" else -1.0

    def values(self, scores: Mapping[str, float]) -> list[float]:
        """The numbers that are maximised."""
        signed = {name: self.sign(name) * scores[name] for name in self.goals}
        if self.weights is None:
            return list(signed.values())
        return [math.fsum(self.weights[name] * value for name, value in signed.items())]

    def error(self, scored: Scored) -> float | None:
        """Standard error of the one number; None where that of a score in it is not known."""
        weights = self.weights or dict.fromkeys(self.goals, 1 / len(self.goals))
        if any(name not in scored.errors for name, weight in weights.items() if weight):
            return None
        return math.sqrt(math.fsum((w * scored.errors[name]) ** 2 for name, w in weights.items() if w))

    def shown(self, value: float) -> float:
        """The one number as the user knows it: of a single score that is minimised, itself."""
        if len(self.goals) == 1 and self.weights is not None:
            ((name, weight),) = self.weights.items()
            return self.sign(name) * value / weight if weight else value
        return value


def space_of(file: SearchFile, inputs: Inputs, folder: Path = Path()) -> Space:
    """The space of a search; RecipeError or PlanError with all that does not fit."""
    if file.sampler.name == FrankWolfe.name:
        if file.space or file.members or file.slices:
            raise RecipeError("sampler frank_wolfe finds a weight for each tensor itself; leave space, members and "
                              "slices out")  # fmt: skip
        return PoolSpace(file, folder)
    if file.genome is not None:
        if file.space or file.members or file.slices:
            raise RecipeError("genome: stands in place of space, members and slices; keep one of them")
        paths = [str(ref.model) for ref in file.recipe.models.values()]
        base: Any = None if file.recipe.base is None else file.recipe.base.model
        if base is None and file.genome.base_model is not None:  # it is one of the models
            base = paths[file.genome.models.index(file.genome.base_model)]
        return EvolveSpace(file.genome, paths, base, _blocks(inputs))
    recipe, problems = file.recipe, []
    entries = []
    for where, genes in file.space.items():
        per = genes.per or ()
        if (fault := check_where(where, stages_written(recipe.method), "model" in per)) is not None:
            problems.append(f"space: {fault}")
            continue
        try:
            entries.append(_entry(where, genes, recipe, inputs))
        except PlanError as error:
            problems += [str(one) for one in error.problems]
    members = None
    if file.members is not None:
        if file.members.least > len(recipe.models):
            problems.append(f"members: least = {file.members.least} of {len(recipe.models)} models")
        members = Members(tuple(recipe.models), file.members.least)
    slots = None
    if file.slices is not None:
        try:
            slots = _slots(file, inputs)
        except (PlanError, RecipeError) as error:
            problems += [str(one) for one in error.problems]
    if problems:
        raise PlanError(problems)
    return RecipeSpace(recipe, entries, members, slots)


def _entry(where: str, genes: Genes, recipe: Recipe, inputs: Inputs) -> Entry:
    per = genes.per or ()
    models = tuple(recipe.models) if "model" in per else ()
    groups = blocks_in_groups(_blocks(inputs), genes.group, f"space: {where}") if "layers" in per else ()
    parts: dict[str, Any] = {**(genes.parts or {}), REST: {}} if "part" in per else {}
    starts = genes.start if isinstance(genes.start, Mapping) else {}
    for name in starts:
        if name not in models:
            raise PlanError(
                [f"space: {where}: start of {name!r}, which is not one of its models{did_you_mean(name, models)}"]
            )
    start = None if isinstance(genes.start, Mapping) else genes.start
    gene = Gene(
        where,
        genes.low if genes.low is not None else 0.0,
        genes.high if genes.high is not None else 1.0,
        genes.values or (),
        genes.log,
        genes.integer,
        start,
        genes.link,
    )
    for name, value in {**starts, "": start}.items():
        inside = value is None or (value in gene.values if gene.values else _within(value, gene))
        if not inside:
            label = f"start of {name}" if name else "start"
            raise PlanError([f"space: {where}: {label} = {value!r} is outside what is searched"])
    return Entry(where, gene, models, groups, genes.smooth, parts, starts)


def _within(value: Any, gene: Gene) -> bool:
    return type(value) in (int, float) and gene.low <= value <= gene.high


def _blocks(inputs: Inputs) -> int:
    """Blocks of the first model: those of its longest stack."""
    reference = inputs.models[0][1]
    return max((key.layer + 1 for key in reference.keys.values() if key.layer is not None), default=0)


def _slots(file: SearchFile, inputs: Inputs) -> Slots:
    spec = file.slices
    assert spec is not None
    names = spec.models or tuple(file.recipe.models)
    for name in names:
        if name not in file.recipe.models:
            raise RecipeError(f"slices.models: unknown model {name!r}{did_you_mean(name, file.recipe.models)}")
    if file.space or file.members:
        raise RecipeError(
            "slices: stacks of layers are passed through, so space and members have no effect; search them apart"
        )
    return Slots(names, blocks_in_groups(_blocks(inputs), spec.group, "slices"), spec.repeats, spec.skip)


def sampler_of(file: SearchFile, space: Space, aim: Aim, folder: Path, settings: Settings = DEFAULT) -> Sampler:
    """The sampler that a file names."""
    name = file.sampler.name
    if name == FrankWolfe.name:
        return FrankWolfe.of(file, space, aim.names, folder, settings)
    made = SAMPLERS[name](space, aim.names, file.seed, file.sampler.options, folder, file.evaluations)
    made.signs = [aim.sign(goal) for goal in aim.goals] if aim.weights is None else [1.0]
    return made
