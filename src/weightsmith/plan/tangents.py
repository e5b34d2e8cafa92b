"""Models that were trained in a tangent space go together where they were linearised around one point."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weightsmith.core.errors import OutputError
from weightsmith.core.problem import Code, Problem
from weightsmith.inputs.opened import Inputs
from weightsmith.io.package.tangent import Tangent, point_of, tangent_of
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.recipe.schema import ModelRef, Recipe

__all__ = ["Tangents", "tangents"]

_CAST = "`tangent: cast` beside the model takes its weights as they are"


@dataclass(frozen=True)
class Tangents:
    """What a merge makes: weights around a point, or ordinary ones (None); and what speaks against it."""

    result: Tangent | None = None
    problems: tuple[Problem, ...] = ()


def tangents(recipe: Recipe, inputs: Inputs) -> Tangents:
    """Which point the models of a recipe belong to; weightsmith.json beside them says so."""
    refs = {**recipe.models, **({} if recipe.base is None else {"base": recipe.base})}
    kept = {name: source for name, source in inputs.models if name not in refs or refs[name].tangent == "keep"}
    found: dict[str, Tangent | None] = {}
    problems: list[Problem] = []
    for name, source in kept.items():
        try:
            found[name] = _marked(source)
            if found[name] is not None and (text := _beside(name, refs.get(name), found[name])):
                problems.append(Problem(Code.FIT, name, text))
        except OutputError as error:
            problems.append(Problem(Code.INPUT, name, str(error)))
    marked = {name: tangent for name, tangent in found.items() if tangent is not None}
    if problems or not marked:
        return Tangents(None, tuple(problems))
    first, tangent = next(iter(marked.items()))
    others = [_other(name, found[name], kept[name], first, tangent) for name in found]
    return Tangents(tangent, tuple(Problem(Code.FIT, name, text) for name, text in filter(None, others)))


def _marked(source: Source) -> Tangent | None:
    """The first mark among all folders that are read for a source: a nested merge has those of its models."""
    marks = map(tangent_of, filter(Path.is_dir, source.origin.locations))
    return next((mark for mark in marks if mark is not None), None)


def _beside(name: str, ref: ModelRef | None, tangent: Tangent | None) -> str:
    """What is wrong with the model that an adapter is put on; '' where nothing is, or it is not on this machine."""
    if tangent is None or ref is None or ref.adapter is None or not isinstance(ref.model, str):
        return ""
    folder = Path(ref.model)
    if not folder.is_dir() or point_of(open_source(folder)) == tangent.point:
        return ""
    return f"{name}: {ref.adapter} was linearised around {tangent}, and {ref.model} is another model; {_CAST}"


def _other(name: str, own: Tangent | None, source: Source, first: str, tangent: Tangent) -> tuple[str, str] | None:
    """Why a model does not go with one that was linearised around a point."""
    if own is not None and own.point == tangent.point:
        return None
    if own is not None:
        return (
            name,
            f"{name}: linearised around {own}, but {first} around {tangent}: no tangent space has both; {_CAST}",
        )
    if tangent.point in (point_of(source), ""):
        return None  # the point itself
    return name, f"{name}: an ordinary model, and {first} was linearised around {tangent}; {_CAST}"
