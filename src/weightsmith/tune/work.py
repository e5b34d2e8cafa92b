"""The plan of a tuning: the recipe with traced numbers, and where its tensors lie in the module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from weightsmith.core.errors import PlanError, RecipeError, did_you_mean
from weightsmith.core.keys import Key
from weightsmith.core.method import Parameter, registry
from weightsmith.inputs.opened import Inputs
from weightsmith.jobs.nested import RecipeSource, open_inputs
from weightsmith.observe.names import Naming
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.table import table_in_memory
from weightsmith.tune.once import Once
from weightsmith.tune.setting import Setting
from weightsmith.tune.space import Free, Numbers

__all__ = ["Work", "as_one", "prepared", "without"]

ONE = "merged"
"""What the model is called that all models are made into beforehand."""


@dataclass(frozen=True, eq=False)
class Work:
    """A recipe whose free parameters are numbers to learn: its tree without them, the plan with them.

    places  the checkpoint's name -> the module's parameter
    """

    tree: dict[str, Any]
    numbers: list[Numbers]
    plan: Plan
    inputs: Inputs
    places: dict[str, Tensor]


def as_one(
    tree: Mapping[str, Any], given: Mapping[str, Any] | None, stages: tuple[Any, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe of one model, which is the merge of the recipe's by these stages: a nested recipe.

    The model is at hand, merged once and not at every step.
    """
    inner = {name: tree[name] for name in ("base", "models", "exclude") if name in tree}
    inner |= {"method": list(stages), "output": {"dtype": "float32"}}
    recipe = Recipe.model_validate(inner)
    source = Once(RecipeSource(recipe, open_inputs(recipe, given), "the models made into one"))
    known = {name: found for name, found in (given or {}).items() if name == "base"}
    return {**tree, "models": {ONE: {"model": inner}}}, {**known, ONE: source}


def prepared(tree: dict[str, Any], given: Mapping[str, Any] | None, setting: Setting, module: nn.Module) -> Work:
    """Plan the recipe with traced numbers in place of what is learned.

    given  sources that are at hand, by name; 'base' for the base

    Raises RecipeError or PlanError for what does not fit.
    """
    tree = dict(tree)
    if setting.method is not None:
        tree["method"] = list(setting.method)
    tree = without(tree, {*setting.free, *setting.given})
    recipe = Recipe.model_validate(tree)
    inputs = open_inputs(recipe, given)
    reference = inputs.models[0][1] if inputs.models else None
    places, buffers = _places(module, reference)
    left = [
        name for name in (reference.keys if reference else ()) if any(fnmatchcase(name, g) for g in setting.exclude)
    ]
    left += (
        [key.name for key in reference.keys.values() if setting.matrices and len(key.shape) != 2] if reference else []
    )
    if more := [*buffers, *left]:
        tree["exclude"] = list(dict.fromkeys([*_listed(tree.get("exclude", ())), *more]))
    working = tree | {"output": {**tree.get("output", {}), "dtype": "float32"}}
    first = make_plan(Recipe.model_validate(working), sources=inputs)
    first.refuse_tangent()
    owners = _owners(recipe)
    numbers = []
    for name, free in setting.free.items():
        if name not in owners:
            raise RecipeError(f"free: no stage of {first.recipe.method[0].name} has a parameter {name!r}"
                              f"{did_you_mean(name, owners)}")  # fmt: skip
        keys = _keys(first)
        if not keys:
            raise RecipeError(f"free: {name} concerns no tensor that the recipe merges")
        numbers.append(Numbers(name, free, owners[name], tuple(inputs.experts), keys))
        _refuse_strangers(name, free, keys, tuple(inputs.experts), () if reference is None else tuple(reference.keys))
    models = tuple(inputs.experts)
    given_values = {name: table_in_memory(name, models, values) for name, values in setting.given.items()}
    values = {**tree.get("parameters", {}), **given_values, **{one.name: one.table for one in numbers}}
    plan = make_plan(Recipe.model_validate(working | {"parameters": values}), sources=inputs)
    return Work(tree, numbers, plan, inputs, places)


def _refuse_strangers(
    name: str, free: Free, keys: Sequence[Key], models: tuple[str, ...], every: tuple[str, ...]
) -> None:
    """Raise RecipeError for models that a start names and that are none, and for globs that match nothing learned."""
    if unknown := [m for m in (free.start if isinstance(free.start, Mapping) else ()) if m not in models]:
        raise RecipeError(f"free: {name}: start names {unknown[0]!r}, no model{did_you_mean(unknown[0], models)}")
    for glob, count in free.parts.items() if isinstance(free.parts, Mapping) else ():
        if glob != "*" and count > 0 and not any(fnmatchcase(key.name, glob) for key in keys):
            still = next((tensor for tensor in every if fnmatchcase(tensor, glob)), None)
            why = "matches no tensor" if still is None else f"matches {still}, which is not learned: it stays as it is"
            raise RecipeError(f"free: {name}: {glob!r} {why}")


def _owners(recipe: Recipe) -> dict[str, Parameter]:
    """The parameters of the recipe's stages by name; those of a sum that is only implied count too."""
    stages = [spec.name for spec in recipe.method]
    found: dict[str, Parameter] = {}
    for stage in [*stages, "task_arithmetic"]:
        for parameter in registry(stage).parameters():
            found.setdefault(parameter.name, parameter)
    return found


def _keys(plan: Plan) -> list[Key]:
    """Tensors that are merged and not copied, each once, in the plan's order."""
    return list({task.key.name: task.key for task in plan.tasks if task.pipeline is not None}.values())


def without(tree: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The recipe without the parameters that are learned, wherever they stand outside rules."""
    made = Recipe.model_validate(tree).model_dump(mode="json", exclude_defaults=True)
    names = frozenset(names)

    def cleared(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in names}

    made["method"] = [{**stage, "parameters": cleared(stage.get("parameters", {}))} for stage in made["method"]]
    made["models"] = {name: cleared(model) for name, model in made["models"].items()}
    made["parameters"] = cleared(made.get("parameters", {}))
    return made


def _listed(words: Any) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def _places(module: nn.Module, reference: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Checkpoint's name -> the module's parameter; and the checkpoint's names of buffers, which stay."""
    on_disk = reference is not None and reference.origin.folder is not None and hasattr(module, "config")
    naming = Naming(module, reference if on_disk else None)
    aliases: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    places: dict[str, Tensor] = {}
    for _, parameter in module.named_parameters():
        stored = naming.name(*aliases[id(parameter)]) if on_disk else _stored(aliases[id(parameter)], reference)
        if stored is not None:
            places[stored] = parameter
    if not places:
        raise PlanError(["the module has no parameter with a name of the base checkpoint; is it the same model?"])
    buffers = [name for name, _ in module.named_buffers() if reference is not None and name in reference.keys]
    return places, buffers


def _stored(names: Sequence[str], reference: Any) -> str | None:
    return next((name for name in names if reference is not None and name in reference.keys), None)
