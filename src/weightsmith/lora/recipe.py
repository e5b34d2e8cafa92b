"""Recipes for `weightsmith lora merge`: adapters in, one adapter out.

    models:
      math: {model: adapters/math, weight: 0.7}
      code: adapters/code
    method: ties_svd
    parameters: {density: 0.5, rank: 16}
    output: {dtype: bfloat16}

`parameters` go to the method; those that may differ between adapters may stand with a model, or be a mapping from
models' names to values.  Paths that exist beside the recipe file are meant relative to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.keys import DTYPES
from weightsmith.core.method import Parameter
from weightsmith.io.read.small import read_small
from weightsmith.lora.rules import METHODS, Averaged, Combine, SharedBasis, named
from weightsmith.recipe.check import spell
from weightsmith.recipe.override import override
from weightsmith.recipe.reader import MAX_BYTES, Document, Place, read
from weightsmith.recipe.schema import StageSpec

__all__ = ["AdapterRecipe", "AdapterRef", "built", "load", "loads", "method_of"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AdapterRef(BaseModel):
    """One adapter: its folder.  Any further key is a parameter of the method for this adapter alone."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    model: Annotated[str, Field(description="folder with adapter_config.json")]

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class AdapterOutput(_Frozen):
    """How the result is stored."""

    dtype: str | None = Field(default=None, description="float32, bfloat16, ...; default: as the adapters store theirs")

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        floats = [d.name for d in DTYPES.values() if d.floating and d.itemsize > 1]
        if value is not None and value not in floats:
            raise ValueError(f"unknown dtype {value!r}{did_you_mean(value, floats)}")
        return value


def _ref(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class AdapterRecipe(_Frozen):
    """Adapters in, one adapter out."""

    models: dict[str, Annotated[AdapterRef, BeforeValidator(_ref)]] = Field(min_length=1)
    method: StageSpec
    base: str | None = Field(default=None, description="noted in the result as its base; default: the adapters' own")
    parameters: dict[str, Any] = Field(default_factory=dict)
    output: AdapterOutput = Field(default_factory=AdapterOutput)
    seed: int = Field(default=0, description="of the masks that are drawn")


def load(path: str | Path, overrides: Sequence[str] = ()) -> AdapterRecipe:
    """Read a recipe file; `overrides` are texts like 'parameters.density=0.3'.

    Raises RecipeError: file, line, what is wrong, the nearest valid word.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    try:
        text = read_small(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8 text; is this a recipe?") from None
    return loads(text, str(path), overrides, path.absolute().parent)


def loads(text: str, where: str = "recipe", overrides: Sequence[str] = (), folder: Path | None = None) -> AdapterRecipe:
    """Read a recipe from text; `where` is what messages call it, `folder` what its paths are relative to."""
    document = read(text, where)
    for assignment in overrides:
        override(document, assignment)
    tree = document.tree
    if not isinstance(tree, dict):
        raise RecipeError(f"{document.at(())}: a recipe is a mapping with models and method")
    return built(document, _located(tree, folder))


def _located(tree: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """The tree with the adapters' paths made absolute where they exist beside the recipe."""
    models = tree.get("models")
    if folder is None or not isinstance(models, dict):
        return tree

    def one(ref: Any) -> Any:
        ref = _ref(ref)
        if not isinstance(ref, dict) or not isinstance(ref.get("model"), str):
            return ref
        path = Path(ref["model"]).expanduser()
        return {**ref, "model": str((folder / path).absolute()) if (folder / path).exists() else str(path)}

    return {**tree, "models": {name: one(ref) for name, ref in models.items()}}


def built(document: Document, tree: Mapping[str, Any]) -> AdapterRecipe:
    """The recipe that a tree of plain values says; RecipeError with the document's lines for what is wrong."""
    try:
        recipe = AdapterRecipe.model_validate({key: value for key, value in tree.items() if value is not None})
    except ValidationError as error:
        lines = dict.fromkeys(_said(document, detail) for detail in error.errors(include_url=False))
        raise RecipeError("; ".join(lines)) from None
    try:
        method_of(recipe)
    except RecipeError as error:
        raise RecipeError(f"{document.at(('method',))}: {error}") from None
    return recipe


_FIELDS: Mapping[Place, type[BaseModel]] = {(): AdapterRecipe, ("output",): AdapterOutput}


def _said(document: Document, detail: Any) -> str:
    place: Place = tuple(step for step in detail["loc"] if not str(step).startswith("function-"))
    where = document.at(place)
    if detail["type"] == "extra_forbidden":
        known = _FIELDS.get(place[:-1])
        hint = did_you_mean(str(place[-1]), known.model_fields if known else ())
        return f"{where}: unknown key {str(place[-1])!r} in {spell(place[:-1])}{hint}"
    if detail["type"] == "missing":
        return f"{where}: {spell(place[:-1])} has no {str(place[-1])!r}"
    return f"{where}: {spell(place)}: {str(detail['msg']).removeprefix('Value error, ')}"


def method_of(recipe: AdapterRecipe) -> Combine | SharedBasis | Averaged:
    """The method with all its parameters; RecipeError for what it does not take."""
    name, names = recipe.method.name, list(recipe.models)
    cls = named(name)
    if isinstance(cls, str):
        raise RecipeError(cls)
    specs = {spec.name: spec for spec in cls.parameters()}
    given: dict[str, Any] = {}
    for source in (recipe.parameters, recipe.method.parameters):
        for key, value in source.items():
            if key not in specs:
                raise RecipeError(f"{name} has no parameter {key!r}{did_you_mean(key, specs)}")
            given[key] = _by_name(value, specs[key], names) if isinstance(value, Mapping) else value
            if isinstance(value, (list, tuple)) and len(value) != len(names):
                raise RecipeError(f"{name}: {key} has {len(value)} values for {len(names)} adapters")
    own = {model: ref.parameters for model, ref in recipe.models.items()}
    for key in dict.fromkeys(key for parameters in own.values() for key in parameters):
        if key not in specs or not specs[key].each:
            able = [each for each, spec in specs.items() if spec.each]
            problem = "is the same for all adapters" if key in specs else f"is unknown{did_you_mean(key, able)}"
            raise RecipeError(f"{next(m for m, p in own.items() if key in p)}: parameter {key!r} of {name} {problem}")
        usual = given.get(key, specs[key].default)
        spread = usual if isinstance(usual, (list, tuple)) else [usual] * len(names)
        given[key] = [own[model].get(key, spread[i]) for i, model in enumerate(names)]
    method = METHODS[name](**{specs[key].field: value for key, value in given.items()})
    said = method.check(len(names), False)
    if said:
        raise RecipeError(said)
    return method


def _by_name(value: Mapping[str, Any], spec: Parameter, names: Sequence[str]) -> list[Any]:
    """{model: value} as a list in the recipe's order; a model that is left out has the default."""
    for name in value:
        if name not in names:
            raise RecipeError(f"{spec.name}: there is no model {name!r}{did_you_mean(str(name), names)}")
    return [value.get(name, spec.default) for name in names]
