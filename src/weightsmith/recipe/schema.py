"""The recipe: what the user asked for, as a frozen value.  YAML, JSON and Python make the same one."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, ValidationInfo, field_validator

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.method import registered
from weightsmith.core.units import parse_size
from weightsmith.io.read.folder import INDEX
from weightsmith.recipe.check import method_faults, written
from weightsmith.recipe.fields import (
    KEEP,
    OUTSIDE,
    BlockRange,
    Dtype,
    Located,
    LocatedWords,
    Selector,
    Stages,
    StageSpec,
    Values,
    WithParameters,
    Words,
    listed,
    named,
)
from weightsmith.recipe.files import SUFFIXES, exists
from weightsmith.recipe.grammar import PYTHON, Fault, Grammar, Reading, kind_of, listing, mapping, unknown
from weightsmith.recipe.reader import Document, Location, spell

__all__ = [
    "OUTSIDE",
    "ModelRef",
    "Module",
    "Modules",
    "Output",
    "Recipe",
    "Rule",
    "Slices",
    "StageSpec",
    "Tokenizer",
    "missing_inputs",
]  # fmt: skip


def _model(value: Any, info: ValidationInfo) -> Any:
    """A path or hub id, a recipe in a file of its own, or a model made of models."""
    reading: Reading = info.context or PYTHON
    if isinstance(value, (Recipe, Slices, Modules)):
        return value
    if isinstance(value, Mapping):
        for kind in (Slices, Modules):
            if kind.model_fields.keys() & value.keys() and "models" not in value:
                return kind.model_validate(value, context=reading)
        return Recipe.model_validate(value, context=reading)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"should be a path, a hub id or a recipe; is {kind_of(value)}")
    if not value.lower().endswith(SUFFIXES) or value.endswith(INDEX) or reading.nested is None:
        return reading.located(value)
    try:
        return reading.nested(reading.located(value))
    except RecipeError as error:
        raise Fault((), "\n".join(map(str, error.problems)), "nested").error() from None


class ModelRef(WithParameters):
    """One input: a path, a hub id with @revision, a LoRA adapter on `base`, a nested recipe, slices or modules.

    Any further key is a parameter of the method for this model alone (weight, density, ...).
    """

    model: Annotated[Any, PlainValidator(_model)] = Field(
        description="path, hub id[@revision], nested recipe, slices or modules", examples=["PATH"]
    )
    adapter: Located | None = Field(default=None, description="LoRA adapter that is put on it first")
    align: Located | None = Field(
        default=None, description="folder written by `weightsmith align` for it: its units in another model's order"
    )
    stats: LocatedWords = Field(default=(), description="folders written by `weightsmith observe` for this model")
    layers: BlockRange | None = Field(default=None, description="take blocks start..end only, the end not included")
    stack: str | None = Field(
        default=None, description="which blocks `layers` counts (model.decoder.layers), where a model has several kinds"
    )
    expert: str | None = Field(default=None, description="which model of a compressed folder")
    tangent: Literal["keep", "cast"] = Field(
        default="keep", description="cast: take weights of a linearised model as ordinary ones, or the other way round"
    )
    names: dict[str, str] = Field(
        default_factory=dict, description="beginnings of its tensors' names -> what stands in their place"
    )

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        return ({"model": given}, {"model": ()}) if is_composed(given) else super().long_form(given, reading)

    @classmethod
    def own(cls, ref: Any) -> dict[str, Any]:
        return {} if is_composed(ref) else super().own(ref)

    @classmethod
    def without_parameters(cls, ref: Any, location: Location, why: str) -> Iterator[Fault]:
        """The faults of a model that parameters do not belong to."""
        for key in cls.own(ref):
            yield unknown((*location, key), cls.model_fields, f"; {why}")


def is_composed(value: Any) -> bool:
    """Whether a mapping is a model made of models (a recipe, slices, modules) rather than an entry with parameters."""
    return isinstance(value, Mapping) and any(word in value for word in ("models", "slices", "modules"))


class Slices(Grammar):
    """Slices of models, one on top of the other: each with its `layers`; a slice may be a recipe of its own."""

    slices: Annotated[tuple[ModelRef, ...], listed("models", 1)] = Field(
        json_schema_extra={"minItems": 1}, description="from the first block to the last"
    )

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        for i, ref in enumerate(listing(tree.get("slices"))):
            yield from ModelRef.without_parameters(ref, ("slices", i), "parameters belong to the models of a recipe")


class Module(Grammar):
    """Part of a model, by the names of its tensors, and where it is taken from."""

    match: Words = Field(default=("*",), description="globs over tensor names; the first module that matches has them")
    model: ModelRef = Field(description="a model, or a recipe that makes these tensors")

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if not isinstance(given, Mapping) or "model" not in given:
            raise ValueError(f"should be a mapping with match and model; is {kind_of(given)}")
        return given, {}

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        yield from ModelRef.without_parameters(
            tree.get("model"), ("model",), "parameters belong to the models of a recipe"
        )


class Modules(Grammar):
    """A model put together of modules (vision tower, text decoder, ...), each with a model or a recipe of its own."""

    modules: Annotated[dict[str, Module], named("modules")] = Field(
        json_schema_extra={"minProperties": 1}, description="name -> tensors and model"
    )


class Rule(Selector):
    """Another method or other parameters for some tensors.  The first rule that matches a tensor wins."""

    method: Stages | None = Field(default=None, description="method or pipeline; 'keep' takes the base's tensor")
    parameters: Values = Field(default_factory=dict)
    dtype: Dtype | None = Field(
        default=None, description="how they are stored; a rule that says no more leaves the method to other rules"
    )

    @property
    def of_method(self) -> bool:
        """Whether it says how tensors are merged, not only how they are stored."""
        return self.method is not None or bool(self.parameters) or self.dtype is None


class Output(Grammar):
    """How the result is stored."""

    dtype: Dtype | None = Field(default=None, description="float32, bfloat16, ...; default: as the base stores it")
    shard_size: str | int = Field(default="5GB", description="largest size of one safetensors file")

    @field_validator("shard_size")
    @classmethod
    def _size(cls, value: str | int) -> str | int:
        if parse_size(value) < 1:
            raise ValueError("shard_size must be positive")
        return value


class Tokenizer(Grammar):
    """Whose tokenizer the result has, and what becomes of tokens that not all models have."""

    SHORT: ClassVar[str] = "source"

    source: str = Field(description="'base', 'union', a model's name, or a folder")
    tokens: Values = Field(default_factory=dict, description="token -> {source: where its row comes from, force: ...}")
    pad_to_multiple_of: int | None = Field(default=None, gt=0, description="rows of the embeddings are padded to that")

    @property
    def plain(self) -> bool:
        """Whether it only says whose files go along."""
        return self.source != "union" and not self.tokens and self.pad_to_multiple_of is None


_MEANT = {
    "adapters": "adapters are models, too: write them under models",
    "base_model": "did you mean 'base'?",
    "codec": "a codec is a method: write method: NAME",
    "dtype": "write output: {dtype: ...}",
    "filter": "a filter stands before its method: write method: [FILTER, METHOD]",
    "filters": "filters stand before their method: write method: [FILTER, METHOD]",
    "lora": "a LoRA adapter is a model, too: write it under models",
    "tokenizer_source": "did you mean 'tokenizer'?",
}
"""Keys that other programs, or a reader's guess, have for something that recipes write otherwise."""


class Recipe(Grammar):
    """Models in, one model out.

    `method` is a name, or a list of stages: `[{dare: {density: 0.5}}, ties, lines]`.
    `parameters` go to the stage that has a field of that name; a value may be a number, a list of
    numbers (a ramp over depth), a mapping from model names to either, or a list of cases by tensor
    (`[{match: "*mlp*", value: 0.3}, 0.5]`: the first that matches).
    """

    ROOT: ClassVar[str] = "the recipe"

    base: ModelRef | None = Field(default=None, description="the model the experts were fine-tuned from")
    models: Annotated[dict[str, ModelRef], named("models", ", as math: path/to/math")] = Field(
        json_schema_extra={"minProperties": 1}, description="name -> model, in order", examples=["{math: path/to/math}"]
    )
    method: Stages = Field(description="method or pipeline", examples=["ties"])
    parameters: Values = Field(default_factory=dict)
    rules: Annotated[tuple[Rule, ...], listed("rules")] = Field(
        default=(), description="exceptions; the first match wins"
    )
    exclude: Words = Field(default=(), description="globs of tensors taken unchanged from the base (or first model)")
    names: dict[str, str] = Field(
        default_factory=dict,
        description="beginnings of tensors' names -> what stands in their place, in every model: {'bert.': ''}",
    )
    tokenizer: Tokenizer | None = Field(
        default=None, description="'base', a model's name, or a folder: whose tokenizer goes along"
    )
    chat_template: str | None = Field(
        default=None, description="Jinja text, 'chatml', a model's name, or 'auto': what most of the models have"
    )
    output: Output = Field(default_factory=Output, description="how the result is stored")
    seed: int = Field(default=0, description="of every random choice")
    extra: Literal["refuse", "first"] = Field(
        default="refuse",
        description="what to do about a kept tensor that the base (or first model) lacks and several models have",
    )
    nonfinite: Literal["refuse", "allow"] = Field(
        default="refuse", description="what to do about NaN or Inf in an input"
    )

    @classmethod
    def document(cls, documents: Sequence[Document], overrides: Sequence[str] = ()) -> Document:
        tree = documents[0].tree
        if len(documents) > 1 or (isinstance(tree, Mapping) and "merge_method" in tree):
            from weightsmith.recipe.mergekit import translate  # loaded for its configs only

            return translate(documents, overrides, cls.model_fields)
        super().document(documents, overrides)
        if isinstance(tree, Mapping) and "experts" in tree and "models" not in tree:
            raise RecipeError(f"{documents[0].at(('experts',))}: this recipe builds a mixture of experts; "
                              'run it with "weightsmith moe"')  # fmt: skip
        return documents[0]

    @classmethod
    def hint(cls, key: str, reading: Reading) -> str:
        if key in _MEANT:
            return f"; {_MEANT[key]}"
        if key in _parameters():
            return f"; {key!r} belongs under parameters"
        return super().hint(key, reading)

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        reading.count()
        return _with_located_tokenizer(given, reading) if isinstance(given, Mapping) else given, {}

    @classmethod
    def not_there(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        # What one word stands for is told where the inputs are opened: in another file that is not done beside faults.
        return missing_inputs(tree, reading, plainly=True)

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        refs = mapping(tree.get("models"))
        yield from method_faults(tree, {name: ModelRef.own(ref) for name, ref in refs.items()}, ModelRef.model_fields)
        yield from ModelRef.without_parameters(tree.get("base"), ("base",), "parameters are for the models")
        if not reading.python:
            if any(name == KEEP for name, *_ in written(tree.get("method"))):
                text = "method 'keep' takes the base's tensor; it is for rules, not for the whole recipe"
                yield Fault(("method",), text)
            yield from _wrong_models(tree.get("base"), refs, reading)
            yield from _unknown_tokenizer(tree)


def missing_inputs(tree: Any, reading: Reading, *, plainly: bool = False) -> Iterator[Fault]:
    """Models, adapters and statistics of a recipe that are not there; `plainly`: of paths with a folder only."""
    from weightsmith.io.read.open import no_such  # loaded for faulty files only

    for location, path in _paths(mapping(tree)):
        told = "/" in path or not plainly
        if told and not path.lower().endswith(SUFFIXES) and (text := no_such(reading.located(path))):
            yield Fault(location, f"{location[-1]}: {text}")


def _paths(tree: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Where the models, adapters and statistics of a recipe are said to be."""
    refs: dict[Location, Any] = {("base",): tree.get("base")}
    refs |= {("models", name): ref for name, ref in mapping(tree.get("models")).items()}
    for location, ref in refs.items():
        entry = ref if isinstance(ref, Mapping) and not is_composed(ref) else {"model": ref}
        stats = entry.get("stats")
        for path in (entry.get("model"), entry.get("adapter"), *(listing(stats) or [stats])):
            if isinstance(path, str) and path.strip():
                yield location, path


def _named(tree: Mapping[str, Any]) -> list[str]:
    """What a tokenizer may be called after."""
    return [*(["base"] if tree.get("base") is not None else []), *mapping(tree.get("models"))]


def _with_located_tokenizer(tree: Mapping[str, Any], reading: Reading) -> Mapping[str, Any]:
    wanted = tree.get("tokenizer")
    block = wanted if isinstance(wanted, Mapping) else {"source": wanted}
    source = block.get("source")
    if not isinstance(source, str) or source in (*_named(tree), "union"):
        return tree
    return {**tree, "tokenizer": {**block, "source": reading.located(source)}}


def _unknown_tokenizer(tree: Mapping[str, Any]) -> Iterator[Fault]:
    wanted, names = tree.get("tokenizer"), _named(tree)
    source = wanted.get("source") if isinstance(wanted, Mapping) else wanted
    if isinstance(source, str) and source not in (*names, "union") and not exists(Path(source)):
        text = f"tokenizer {source!r} is neither a model of this recipe nor a folder"
        yield Fault(("tokenizer", "source"), text, hint=did_you_mean(source, names))


def _wrong_models(base: Any, models: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
    """Names that a model cannot have, and models twice: one under two names weighs double unsaid."""
    seen: dict[str, Location] = {}
    refs: dict[Location, Any] = {("base",): base} if base is not None else {}
    refs |= {("models", name): ref for name, ref in models.items()}
    for location, ref in refs.items():
        if location[-1] in ("", "base") and location != ("base",):
            yield Fault(location, f"a model cannot be called {location[-1]!r}; give it another name")
        tree = ref if isinstance(ref, Mapping) and not is_composed(ref) else {"model": ref}
        model = tree.get("model")
        if not isinstance(model, (str, Mapping)) or not model:
            continue  # a fault of its own
        path = reading.located(model) if isinstance(model, str) else ""
        identity = str(Path(path).resolve()) if path and exists(Path(path)) else repr(model)
        identity += repr([tree.get(part) for part in ("adapter", "align", "layers", "stack", "expert")])
        first = seen.setdefault(identity, location)
        if first != location:
            shown = path or "the same recipe"
            hint = "it has no task vector; leave it out" if first == ("base",) else "leave one out, or give it a weight"
            yield Fault(location, f"{spell(location)} is the same model as {spell(first)} ({shown}); {hint}")


@cache
def _parameters() -> frozenset[str]:
    """Names of the parameters of all stages, found once, for thousands of keys may ask."""
    return frozenset(parameter.name for stage in registered().values() for parameter in stage.parameters())
