"""mergekit-evolve's files: the genome as a space, the tasks as an evaluator of lm-evaluation-harness.

A gene has no bounds: densities are its size cut at 1, weights and t its size unless negative ones are allowed; slerp
takes the two models with the largest genes of a group, and t is the softmax share of the second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from weightsmith.core.errors import PlanError
from weightsmith.recipe.fields import OUTSIDE, Words
from weightsmith.recipe.grammar import Fault, Grammar, Reading, listing, mapping
from weightsmith.recipe.mergekit import translate
from weightsmith.recipe.reader import Document
from weightsmith.recipe.schema import Recipe
from weightsmith.search.genes import Gene, Point
from weightsmith.search.space import Space

__all__ = ["EvolveSpace", "Genome", "translated"]

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}
"""Method -> what there is a gene of."""
ABSENT = ("shuffle", "random_init", "apply_chat_template", "fewshot_as_multiturn")
"""What mergekit-evolve can and this cannot: refused where a file asks for it."""
BASED = ("ties", "dare_ties", "task_arithmetic")
NORMALIZED = ("linear", "ties", "dare_ties")


class Genome(Grammar):
    """What mergekit-evolve calls so."""

    models: Words = Field(description="models that are merged", examples=["[org/a, org/b]"])
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"] = Field(examples=["dare_ties"])
    base_model: str | None = None
    tokenizer_source: Any = None
    layer_granularity: int = Field(default=0, ge=0, description="layers of a group; 0: one gene for all")
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: Words = Field(default=(), description="parts of tensors' names with genes of their own")
    smooth: bool = False

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        method, models = tree.get("merge_method"), listing(tree.get("models"))
        if method in BASED and tree.get("base_model") is None:
            yield Fault((), f"needs a base_model for {method}", "lacking")
        if method == "slerp" and (tree.get("filters") or tree.get("smooth")):
            yield Fault(("merge_method",), "slerp takes neither filters nor smooth", "value")
        if method == "slerp" and len(models) < 2:
            yield Fault(("models",), "should be at least two for slerp", "value")
        if tree.get("smooth") and not tree.get("layer_granularity"):
            yield Fault(("smooth",), "needs a layer_granularity: its groups are the points of the ramp", "value")


def translated(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A file with a genome in the words of a search; other keys of a search may stand beside mergekit's."""
    own = ("tasks", "include", "python", "limit", "num_fewshot", *(key for key in ABSENT if not tree.get(key)))
    made = {key: value for key, value in tree.items() if key not in own}
    tasks = [dict(mapping(task)) for task in listing(tree.get("tasks"))]
    names = [str(task.get("name")) for task in tasks]
    given = mapping(made.get("score"))
    if tasks and set(given) <= {"lm_eval", "timeout", "retries"}:
        named = dict(zip(names, tasks, strict=True))
        splits = {name: {"search": name, "report": task.get("report", name)} for name, task in named.items()}
        metrics = {name: task.get("metric", "acc,none") for name, task in named.items()}
        harness = {"tasks": splits, "metric": metrics, "limit": tree.get("limit"), "shots": tree.get("num_fewshot"),
                   "include": tree.get("include"), "python": tree.get("python")}  # fmt: skip
        harness |= mapping(given.get("lm_eval"))
        made["score"] = {**given, "lm_eval": {key: value for key, value in harness.items() if value is not None}}
    if tasks and "goals" not in made:
        made["goals"] = dict.fromkeys(names, "max")
        made["weights"] = {name: float(task.get("weight", 1.0)) for name, task in zip(names, tasks, strict=True)}
    genome = mapping(tree.get("genome"))
    models = [str(model) for model in listing(genome.get("models"))]
    recipe: dict[str, Any] = {"models": dict(zip(_labels(models), models, strict=True)), "method": "linear"}
    if genome.get("base_model") is not None and str(genome["base_model"]) not in models:
        recipe["base"] = genome["base_model"]
    return {"sampler": "cmaes", **made, "recipe": recipe}


def _labels(models: Sequence[str]) -> list[str]:
    """A name for each model: the end of its path, numbered where two end alike."""
    found: list[str] = []
    for model in models:
        label = model.rstrip("/").rpartition("/")[2] or model
        found.append(label if label not in found else f"{label} {len(found) + 1}")
    return found


class EvolveSpace(Space):
    """mergekit's genotypes; a recipe is what mergekit's config of one would be."""

    def __init__(self, genome: Genome, paths: Sequence[str], base: str | None, blocks: int) -> None:
        self.genome, self.paths, self.base = genome, tuple(paths), base
        self.names = PARAMETERS[genome.merge_method]
        self.parts = [*genome.filters, ""]
        size = genome.layer_granularity
        if size and (not blocks or blocks % size):
            raise PlanError([f"genome: layer_granularity {size} does not divide the {blocks} layers of the model"])
        self.groups = [(i, i + size) for i in range(0, blocks, size)] if size else [(0, blocks)]
        self.genes = tuple(self._genes())

    def _genes(self) -> Iterator[Gene]:
        for group in range(len(self.groups)):
            for model in range(len(self.paths)):
                for part in self.parts:
                    for name in self.names:
                        link = "share" if name == "density" else "abs"
                        free = name != "density" and self.genome.allow_negative_weights
                        start = 1 / len(self.paths) if name == "weight" else 1.0
                        label = f"{name}/{group}/{model}/{part or 'rest'}"
                        yield Gene(label, -1.0 if free else 0.0, 1.0, start=start, link="free" if free else link)

    def _value(self, point: Point, name: str, group: int, model: int, part: str) -> float:
        gene = next(g for g in self.genes if g.name == f"{name}/{group}/{model}/{part or 'rest'}")
        value: float = gene.linked(point[gene.name])
        return value

    def recipe(self, point: Point) -> Recipe:
        config = self.config(point)
        if self.genome.merge_method == "slerp":
            return self._translated(config)
        # One pass reads the models for all candidates if they differ in numbers only: groups as cases, not slices.
        return self._translated({**config, "models": self._models(point)})

    def config(self, point: Point) -> dict[str, Any]:
        """mergekit's config of a genotype, without models for all methods but slerp."""
        genome = self.genome
        normalize = genome.merge_method in NORMALIZED if genome.normalize is None else genome.normalize
        head: dict[str, Any] = {"merge_method": genome.merge_method, "dtype": "bfloat16"}
        if genome.merge_method != "slerp":
            head["parameters"] = {"normalize": normalize}
        if genome.tokenizer_source is not None:
            head["tokenizer_source"] = genome.tokenizer_source
        if self.base is not None:
            head["base_model"] = self.base
        if genome.merge_method != "slerp":
            return head
        pairs = [self._pair(point, group) for group in range(len(self.groups))]
        if not genome.layer_granularity:
            ((first, second, t),) = pairs
            models = [{"model": first}, {"model": second}]
            return {**head, "base_model": first, "models": models, "parameters": {"t": t}}
        head["base_model"] = pairs[0][0]
        slices = [
            {"base_model": first, "parameters": {"t": t},
             "sources": [{"model": m, "layer_range": list(layers)} for m in (first, second)]}
            for layers, (first, second, t) in zip(self.groups, pairs, strict=True)
        ]  # fmt: skip
        return {**head, "slices": slices}

    def _pair(self, point: Point, group: int) -> tuple[str, str, float]:
        """The two models with the largest genes, the larger first, and the softmax share of the second."""
        values = [self._value(point, "t", group, model, "") for model in range(len(self.paths))]
        first, second = sorted(range(len(values)), key=lambda i: -values[i])[:2]
        return self.paths[first], self.paths[second], 1 / (1 + math.exp(values[first] - values[second]))

    def _models(self, point: Point) -> list[dict[str, Any]]:
        return [
            {"model": path, "parameters": {name: self._listed(point, name, model) for name in self.names}}
            for model, path in enumerate(self.paths)
        ]

    def _listed(self, point: Point, name: str, model: int) -> Any:
        """A parameter of one model: a number, a ramp, or an entry for each filter."""
        found = []
        for part in self.parts:
            values = [self._value(point, name, group, model, part) for group in range(len(self.groups))]
            ramp: Any = values if self.genome.smooth else values[0] if len(values) == 1 else {"groups": values}
            found.append({**({"filter": part} if part else {}), "value": ramp})
        return found[0]["value"] if len(found) == 1 else found

    def _translated(self, config: Mapping[str, Any]) -> Recipe:
        """The recipe of a config; values by group of layers, which mergekit has no word for, become cases."""
        models = [dict(model) for model in config.get("models", ())]
        grouped: dict[str, dict[str, Any]] = {}
        for model in models:
            if "parameters" in model:
                grouped[model["model"]] = model["parameters"]
                model["parameters"] = {name: _first(value) for name, value in model["parameters"].items()}
        told = {**config, **({"models": models} if models else {})}
        tree = translate([Document("genome", told)]).tree
        for ref in tree["models"].values():
            path = ref.get("model") if isinstance(ref, dict) else None
            for name, value in grouped.get(str(path), {}).items():
                if _has_groups(value):
                    ref[name] = self._cases(value)
        return Recipe.model_validate(tree)

    def _cases(self, value: Any) -> list[Any]:
        cases: list[Any] = []
        for entry in value if isinstance(value, list) else [{"value": value}]:
            match = {"match": f"*{entry['filter']}*"} if "filter" in entry else {}
            groups = entry["value"]["groups"]
            cases += [{**match, "layers": list(g), "value": v} for g, v in zip(self.groups, groups, strict=True)]
            cases.append({**match, "role": "embed", "layers": OUTSIDE, "value": groups[0]})
            cases.append({**match, "layers": OUTSIDE, "value": groups[-1]})
        return cases


def _has_groups(value: Any) -> bool:
    entries = value if isinstance(value, list) else [{"value": value}]
    return any(isinstance(e, Mapping) and isinstance(e.get("value"), Mapping) for e in entries)


def _first(value: Any) -> Any:
    """The value with that of the first group in place of all."""
    if isinstance(value, Mapping):
        return value["groups"][0] if "groups" in value else {**value, "value": _first(value["value"])}
    return [_first(one) if isinstance(one, Mapping) else one for one in value] if isinstance(value, list) else value
