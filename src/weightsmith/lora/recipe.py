"""Recipes for `weightsmith lora merge`: adapters in, one adapter out.

    models:
      math: {model: adapters/math, weight: 0.7}
      code: adapters/code
    method: ties_svd
    parameters: {density: 0.5, rank: 16}
    output: {dtype: bfloat16}

`parameters` go to the method; those that may differ between adapters may stand with a model, or be a mapping from
models' names to values, or a list in their order.  Paths that exist beside the recipe file are meant relative to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from weightsmith.core.checks import Case
from weightsmith.lora.rules import METHODS, Averaged, Combine, SharedBasis, named
from weightsmith.recipe.check import Checker
from weightsmith.recipe.fields import Located, StageSpec, Values, WideDtype, WithParameters
from weightsmith.recipe.fields import named as by_name
from weightsmith.recipe.grammar import Fault, Grammar, Reading, mapping
from weightsmith.recipe.load import read_file, read_text

__all__ = ["AdapterRecipe", "AdapterRef", "load", "loads", "method_of"]

Method = Combine | SharedBasis | Averaged

_ON_A_BASE = (
    "a model with an adapter is one for weightsmith merge, which merges whole models; here write the adapter's folder "
    "alone, {name}: FOLDER, and the model that all of them stand on once, base: MODEL"
)


class AdapterRef(WithParameters):
    """One adapter: its folder.  Any further key is a parameter of the method for this adapter alone."""

    model: Located = Field(description="folder with adapter_config.json", examples=["PATH"])


class AdapterOutput(Grammar):
    """How the result is stored."""

    dtype: WideDtype | None = Field(
        default=None, description="float32, bfloat16, ...; default: as the adapters store theirs"
    )


class AdapterRecipe(Grammar):
    """Adapters in, one adapter out."""

    ROOT: ClassVar[str] = "the recipe"

    models: Annotated[dict[str, AdapterRef], by_name("adapters")] = Field(examples=["{math: path/to/adapter}"])
    method: StageSpec = Field(examples=["svd"])
    base: str | None = Field(default=None, description="noted in the result as its base; default: the adapters' own")
    parameters: Values = Field(default_factory=dict)
    coefficients: Located | None = Field(
        default=None, description="a file of weights by tensor, in place of `weight` (cat, svd, linear)"
    )
    output: AdapterOutput = Field(default_factory=AdapterOutput)
    seed: int = Field(default=0, description="of the masks that are drawn")

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        own = {name: AdapterRef.own(ref) for name, ref in mapping(tree.get("models")).items()}
        for name, given in own.items():
            if "adapter" in given:
                del given["adapter"]
                yield Fault(("models", name, "adapter"), _ON_A_BASE.format(name=name), "unknown")
        check = Checker(own, ramps=False)
        slots = check.slots(tree.get("method"), ("method",), named, lambda: METHODS)
        check.outside(tree.get("parameters"), ("parameters",), [slots])
        check.with_models(own, [slots], tuple(AdapterRef.model_fields))
        yield from check.faults
        if not check.faults and own and slots:
            method = _method(slots[0].name, {**mapping(tree.get("parameters")), **slots[0].inline}, own)
            if said := method.refusal(Case(len(own), has_base=False)):
                yield Fault(("method",), said)


def load(path: str | Path, overrides: Sequence[str] = ()) -> AdapterRecipe:
    """Read a recipe file; see `weightsmith.recipe.load.read_file`."""
    return read_file(AdapterRecipe, path, overrides)


def loads(text: str, where: str = "recipe", overrides: Sequence[str] = (), folder: Path | None = None) -> AdapterRecipe:
    """Read a recipe from text; see `weightsmith.recipe.load.read_text`."""
    return read_text(AdapterRecipe, text, where, overrides, folder)


def method_of(recipe: AdapterRecipe) -> Method:
    """The method with all its parameters."""
    own = {name: ref.parameters for name, ref in recipe.models.items()}
    return _method(recipe.method.name, {**recipe.parameters, **recipe.method.parameters}, own)


def _method(name: str, parameters: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]]) -> Method:
    """The method called `name`; parameters that a model has of its own, or by its name, become lists in their order."""
    given: dict[str, Any] = {}
    for spec in named(name).parameters():
        usual = parameters.get(spec.name, spec.default)
        apart = isinstance(usual, Mapping) or any(spec.name in mine for mine in own.values())
        if apart:
            for_all = (
                [usual.get(model, spec.default) for model in own]
                if isinstance(usual, Mapping)
                else (usual if isinstance(usual, (list, tuple)) else [usual] * len(own))
            )
            usual = [mine.get(spec.name, each) for mine, each in zip(own.values(), for_all, strict=True)]
        if apart or spec.name in parameters:
            given[spec.field] = usual
    return METHODS[name](**given)
