"""What is searched: genes, and the recipe that a choice of them stands for."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsmith.core.errors import PlanError, RecipeError, did_you_mean
from weightsmith.core.method import Stage, registry
from weightsmith.recipe.fields import OUTSIDE
from weightsmith.recipe.schema import Recipe
from weightsmith.search.genes import Gene, Point
from weightsmith.tune.work import without

__all__ = ["Entry", "Members", "RecipeSpace", "Slots", "Space", "check_where", "key_of"]

REST = "rest"
"""The part of what no other part names."""


class Space(ABC):
    """Genes, and the recipe of a point.

    drawn  whether any point in the genes' ranges is a candidate
    """

    genes: Sequence[Gene]
    drawn: bool = True

    @abstractmethod
    def recipe(self, point: Point) -> Recipe:
        """The recipe that a point stands for; WeightsmithError where it stands for none."""

    @property
    def begin(self) -> dict[str, Any]:
        """Where a search begins."""
        return {gene.name: gene.begin for gene in self.genes}

    def at(self, shares: Sequence[float]) -> dict[str, Any]:
        """The point at 0..1 of every gene's range."""
        return {gene.name: gene.at(float(share)) for gene, share in zip(self.genes, shares, strict=True)}


def key_of(recipe: Recipe) -> str:
    """Equal for equal recipes, whatever genes they come from: 16 hex digits."""
    told = json.dumps(recipe.model_dump(mode="json", exclude_defaults=True))  # the order of models counts
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """One searched value of a recipe, which may differ between models, groups of blocks and parts.

    where   a parameter by its name, 'stage.parameter', or a path into the recipe (`models.math.weight`, `method`)
    gene    bounds and all; its name is that of the entry
    models  the models that have a gene each; none: one for all
    groups  the groups of blocks [start, end) that have one each; none: one for all
    smooth  the groups' genes are the points of a ramp over depth
    parts   label -> selector (as in a case) of the parts that have one each; the last may be `REST`
    starts  model -> where its gene begins
    """

    where: str
    gene: Gene
    models: tuple[str, ...] = ()
    groups: tuple[tuple[int, int], ...] = ()
    smooth: bool = False
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    starts: Mapping[str, Any] = field(default_factory=dict)

    def genes(self) -> Iterator[Gene]:
        """A gene for each part, group and model."""
        for part in self.parts or ("",):
            for group in self.groups or (None,):
                for model in self.models or ("",):
                    start = self.starts.get(model, self.gene.start)
                    yield Gene(**{**vars(self.gene), "name": self._name(part, group, model), "start": start})

    def value(self, point: Point) -> Any:
        """What stands in the recipe: a number, a mapping from models, cases by tensor."""
        if not self.parts:
            return self._by_group("", point)
        cases = []
        for part, selector in self.parts.items():
            found = self._by_group(part, point)
            listed = found if self.groups and not self.smooth else [{"value": found}]
            cases += [{**selector, **case} for case in listed]
        return cases

    def _by_group(self, part: str, point: Point) -> Any:
        if not self.groups:
            return self._by_model(part, None, point)
        if self.smooth:
            ramps = {m: [self._one(part, g, m, point) for g in self.groups] for m in self.models or ("",)}
            return ramps if self.models else ramps[""]
        cases = [{"layers": list(group), "value": self._by_model(part, group, point)} for group in self.groups]
        # As ramps have it: embeddings go with the first blocks, all else outside with the last.
        first, last = cases[0]["value"], cases[-1]["value"]
        return [*cases, {"role": "embed", "layers": OUTSIDE, "value": first}, {"layers": OUTSIDE, "value": last}]

    def _by_model(self, part: str, group: tuple[int, int] | None, point: Point) -> Any:
        if not self.models:
            return self._one(part, group, "", point)
        return {model: self._one(part, group, model, point) for model in self.models}

    def _one(self, part: str, group: tuple[int, int] | None, model: str, point: Point) -> Any:
        return self.gene.linked(point[self._name(part, group, model)])

    def _name(self, part: str, group: tuple[int, int] | None, model: str) -> str:
        blocks = "" if group is None else f"{group[0]}:{group[1]}"
        return "/".join(word for word in (self.where, part, blocks, model) if word)


@dataclass(frozen=True)
class Members:
    """Which models take part: a gene each, at least `least` of them."""

    models: tuple[str, ...]
    least: int = 1

    def genes(self) -> Iterator[Gene]:
        for model in self.models:
            yield Gene(f"member/{model}", values=(False, True), start=True)

    def chosen(self, point: Point) -> tuple[str, ...]:
        """The models of a point in the recipe's order; where too few are chosen, the first others fill up."""
        taken = {model for model in self.models if point[f"member/{model}"]}
        for model in self.models:
            if len(taken) < self.least:
                taken.add(model)
        return tuple(model for model in self.models if model in taken)


@dataclass(frozen=True)
class Slots:
    """Slices of layers as genes: one stack after the other of places, each filled by one model's blocks or by none.

    groups   blocks of one stack, group by group
    repeats  stacks on top of each other: with 2, a model's blocks may stand there twice
    skip     a place may stay empty

    Source: the data-flow space of "Evolutionary Optimization of Model Merging Recipes" (Akiba et al., 2024), without
    its scaling of what goes from one place to the next, which weights alone cannot hold.
    """

    models: tuple[str, ...]
    groups: tuple[tuple[int, int], ...]
    repeats: int = 1
    skip: bool = False

    def genes(self) -> Iterator[Gene]:
        values: tuple[Any, ...] = (*self.models, *([None] if self.skip or self.repeats > 1 else []))
        for stack in range(self.repeats):
            for start, stop in self.groups:
                first = self.models[0] if not stack else None
                yield Gene(f"slice/{stack}/{start}:{stop}", values=values, start=first)

    def tree(self, tree: dict[str, Any], point: Point) -> dict[str, Any]:
        """The recipe of stacked blocks: one model put together of slices, passed through."""
        refs = tree["models"]
        taken: list[dict[str, Any]] = []
        for stack in range(self.repeats):
            for start, stop in self.groups:
                model = point[f"slice/{stack}/{start}:{stop}"]
                if model is None:
                    continue
                ref = {"model": refs[model]} if isinstance(refs[model], str) else refs[model]
                if taken and taken[-1]["model"] == ref["model"] and taken[-1]["layers"][1] == start:
                    taken[-1]["layers"] = [taken[-1]["layers"][0], stop]
                else:
                    taken.append({**ref, "layers": [start, stop]})
        if not taken:
            raise RecipeError("no slice is taken: the result would have no block")
        rest = {k: v for k, v in tree.items() if k not in ("base", "parameters", "rules")}
        return {**rest, "models": {"stack": {"slices": taken}}, "method": [{"name": "passthrough"}]}


class RecipeSpace(Space):
    """Values of a recipe, which models take part in it, and slices."""

    def __init__(
        self, recipe: Recipe, entries: Sequence[Entry], members: Members | None = None, slots: Slots | None = None
    ) -> None:
        self._entries, self._members, self._slots = tuple(entries), members, slots
        self._stages = [spec.name for spec in recipe.method]
        named = {entry.where for entry in entries if "." not in entry.where and entry.where != "method"}
        self._tree = without(recipe.model_dump(mode="json", exclude_defaults=True), named)
        found = [gene for entry in entries for gene in entry.genes()]
        found += [*members.genes()] if members is not None else []
        found += [*slots.genes()] if slots is not None else []
        if not found:
            raise RecipeError("space: nothing to search; name a parameter with its bounds, as weight: [0, 1]")
        self.genes = tuple(found)

    def recipe(self, point: Point) -> Recipe:
        tree = copy.deepcopy(self._tree)
        for entry in self._entries:
            self._put(tree, entry, entry.value(point))
        if self._members is not None:
            tree = _with_members(tree, self._members.chosen(point))
        if self._slots is not None:
            tree = self._slots.tree(tree, point)
        return Recipe.model_validate(tree)

    def _put(self, tree: dict[str, Any], entry: Entry, value: Any) -> None:
        first, _, rest = entry.where.partition(".")
        if not rest and first not in Recipe.model_fields:
            tree.setdefault("parameters", {})[first] = value
        elif first in self._stages and first not in Recipe.model_fields:
            stage = next(stage for stage in tree["method"] if stage["name"] == first)
            stage.setdefault("parameters", {})[rest] = value
        else:
            _at_path(tree, entry.where.split("."), value)


def _with_members(tree: dict[str, Any], chosen: Sequence[str]) -> dict[str, Any]:
    """The recipe with some of its models; what mappings say of the others goes."""

    def left(value: Any) -> Any:
        if isinstance(value, Mapping):
            names = set(value) <= set(tree["models"]) and value
            return {k: left(v) for k, v in value.items() if not names or k in chosen}
        return [left(v) for v in value] if isinstance(value, list) else value

    models = {name: ref for name, ref in tree["models"].items() if name in chosen}
    cut: dict[str, Any] = {key: left(tree[key]) for key in ("parameters", "method", "rules") if key in tree}
    return {**tree, **cut, "models": models}


def _at_path(tree: Any, words: Sequence[str], value: Any) -> None:
    """Set a value in a tree by the words of its path."""
    *way, last = words
    for word in way:
        if isinstance(tree, list):
            tree = tree[int(word)]
        else:
            inner = tree.setdefault(word, {})
            if isinstance(inner, str) and word not in ("method",):
                inner = tree[word] = {"model": inner}
            tree = inner
    if isinstance(tree, list):
        tree[int(last)] = value
    else:
        tree[last] = value


def check_where(where: str, stages: Mapping[str, type[Stage]], per_model: bool) -> str | None:
    """What is wrong with the place that an entry names; None where there is such a parameter or path."""
    first, _, rest = where.partition(".")
    if rest and first in Recipe.model_fields:
        return None
    if first in Recipe.model_fields:
        return f"{where}: one gene for each model makes no sense there" if per_model else None
    implied = {} if rest else {"task_arithmetic": registry("task_arithmetic")}
    taken = {first: stages[first]} if rest and first in stages else {} if rest else {**stages, **implied}
    name = rest or first
    known = {p.name: p for stage in taken.values() for p in stage.parameters()}
    if name not in known:
        words = [*known, *Recipe.model_fields] if not rest else [f"{first}.{p}" for p in known]
        return f"no stage of {' | '.join(stages)} has a parameter {where!r}{did_you_mean(where, words)}"
    if per_model and not known[name].each:
        return f"{where} is one value for all models; take model out of per"
    return None


def blocks_in_groups(count: int, size: int, what: str) -> tuple[tuple[int, int], ...]:
    """Groups of `size` consecutive blocks; PlanError where they do not come out even."""
    if size < 1 or not count or count % size:
        raise PlanError([f"{what}: the model has {count} blocks, which are not divisible into groups of {size}"])
    return tuple((start, start + size) for start in range(0, count, size))
