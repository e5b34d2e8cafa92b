"""`weightsmith.merge`: the same plan, tasks and arithmetic as the command line, from Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.core.method import Pipeline, Stage
from weightsmith.core.settings import DEFAULT
from weightsmith.engine.gradient import attached
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource, Source
from weightsmith.jobs.merge import merge_job
from weightsmith.jobs.nested import open_inputs
from weightsmith.recipe.schema import ModelRef, Output, Recipe, Rule, StageSpec, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.io.url import Url

__all__ = ["merge"]

MethodLike = str | Stage | Pipeline | Sequence[Any]


def merge(
    models: Mapping[str, Any] | Sequence[Any],
    method: MethodLike = "average",
    base: Any = None,
    out: str | Path | None = None,
    *,
    stats: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    rules: Sequence[Mapping[str, Any]] = (),
    exclude: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    extra: Literal["refuse", "first"] = "refuse",
    nonfinite: Literal["refuse", "allow"] = "refuse",
    tokenizer: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Tensor] | Path | Url:
    """Merge models into one.

    models      name -> model, or a list (named m0, m1, ...).  A model is a state dict, an `nn.Module`, a path,
                a URL (s3://bucket/model), a hub id or a Source
    method      a name, a stage such as `Ties(density=0.3)`, a pipeline `Dare(density=0.5) | Ties()`, or a list
    base        the model the others were fine-tuned from, where the method needs one
    out         a folder or URL to write; without it the merged tensors are returned as a dict
    stats       model name -> statistic -> {parameter name: tensor} or a path
    seed        of every random choice
    dtype       of the result's floating tensors; default: as the base (or first model) stores them
    rules       exceptions for some tensors, as in a recipe: `[{"match": "*norm*", "method": "keep"}]`
    exclude     globs of tensors taken unchanged from the base (or first model)
    names       beginnings of tensors' names -> what stands in their place, in every model: `{"bert.": ""}`
    extra       what to do about a kept tensor that the base (or first model) lacks and several models have
    nonfinite   what to do about NaN or Inf in an input
    tokenizer   whose vocabulary the result has, as in a recipe: "union", "base", a model's name, or a folder
    options     fields of `Settings` (memory, threads, device, progress, resume, ...), and parameters of the method as
                in a recipe (`density=0.3`, `weight={"math": 0.5}`; lambda is written lambda_)

    A parameter may be a tensor that requires grad, where the method has a derivative with respect to it
    (`weight`, `lambda`, `scaling`, ...).  Tensors returned as a dict then have its gradient: backward reads the models
    once more, block by block (`engine.gradient`).  What is written to `out` takes its number.

    Raises PlanError (all problems at once), RecipeError, SourceError or NumericError.
    """
    settings, parameters = DEFAULT.taken_from(options)
    if isinstance(models, str):
        raise RecipeError(f"expected a list of models, or a dict by name, got {models!r}; write [{models!r}, ...]")
    named = dict(models) if isinstance(models, Mapping) else {f"m{i}": m for i, m in enumerate(models)}
    origin = None if base is None else open_source(base)
    experts = {name: open_source(model, base=origin) for name, model in named.items()}
    with _one_line():
        recipe = Recipe(
            base=ModelRef(model="base") if origin is not None else None,
            models={name: ModelRef(model=name) for name in named},
            method=tuple(_specs(method, tuple(named))),
            parameters={name.rstrip("_"): _plain(value) for name, value in parameters.items()},
            rules=tuple(Rule.model_validate(rule) for rule in rules),
            exclude=tuple(exclude),
            names=dict(names or {}),
            extra=extra,
            nonfinite=nonfinite,
            tokenizer=Tokenizer.model_validate(tokenizer) if tokenizer is not None else None,
            output=Output(dtype=dtype),
            seed=seed,
        )
    given = {**experts, **({"base": origin} if origin is not None else {})}
    inputs = replace(open_inputs(recipe, given), stats=_stats(stats or {}, experts))
    job = merge_job(recipe, settings, None if out is None else Path(out), inputs)
    if out is not None:
        return job.run(Path(out), settings).out
    if job.plan.problems:
        raise PlanError(job.plan.problems)
    return attached(job.plan, inputs, job.tensors(settings), job.plan.threads)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Say what pydantic finds wrong with a part of a recipe as any other error is said."""
    try:
        yield
    except ValidationError as error:
        found = error.errors(include_url=False)
        said = (".".join(map(str, (*one["loc"],))) + f": {one['msg']}" for one in found)
        raise RecipeError("; ".join(line.removeprefix(": ") for line in said)) from None


def _specs(method: MethodLike, names: tuple[str, ...]) -> list[StageSpec]:
    """Name, stage value, pipeline or list -> what a recipe holds."""
    if isinstance(method, Pipeline):
        return [spec for stage in method.stages for spec in _specs(stage, names)]
    if isinstance(method, Stage):
        own = {p.name: _by_name(getattr(method, p.field), names, p.name) for p in method.parameters()}
        return [StageSpec(name=method.name, parameters=own)]
    if isinstance(method, str):
        return [StageSpec(name=method)]
    if isinstance(method, Mapping):
        return [StageSpec.model_validate(method)]
    return [spec for part in method for spec in _specs(part, names)]


def _by_name(value: Any, names: tuple[str, ...], parameter: str) -> Any:
    """One value per expert, by position, as a recipe writes it: by name."""
    if not isinstance(value, tuple):
        return value
    if len(value) != len(names):
        raise RecipeError(f"{parameter} has {len(value)} values for {len(names)} models")
    return dict(zip(names, value, strict=True))


def _plain(value: Any) -> Any:
    """A tuple could mean one value per model or a ramp over depth: refuse the doubt."""
    if isinstance(value, tuple) or getattr(value, "ndim", 0) == 1:
        raise RecipeError(
            f"{value!r}: write one value per model as a dict ({{'math': 0.5}}), a ramp over depth as a list"
        )
    return value


def _stats(given: Mapping[str, Mapping[str, Any]], experts: Mapping[str, Source]) -> dict[str, dict[str, Source]]:
    out: dict[str, dict[str, Source]] = {}
    for name, by_stat in given.items():
        if name not in experts:
            raise PlanError([f"statistics are given for {name!r}, which is not among the models {list(experts)}"])
        for stat, tensors in by_stat.items():
            source = (
                MemorySource(tensors, f"{stat} of {name}") if isinstance(tensors, Mapping) else open_source(tensors)
            )
            out.setdefault(stat, {})[name] = source
    return out
