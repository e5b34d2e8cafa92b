"""The grammar of mergekit's configs.  What mergekit would ignore in silence is a fault here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, Field, PlainValidator

from weightsmith.core.errors import did_you_mean
from weightsmith.recipe.fields import BlockRange, listed
from weightsmith.recipe.grammar import Fault, Grammar, Reading
from weightsmith.recipe.mergekit_methods import METHODS, Known
from weightsmith.recipe.mergekit_values import Bad, Level, Window, native_value

__all__ = ["Config", "Dialect", "Input", "Part", "Reference", "Slice", "reference"]

_DTYPES = ("bfloat16", "float16", "float32", "float64")


class Reference(NamedTuple):
    """A model as mergekit names it: a path with its revision, and an adapter."""

    model: str
    adapter: str | None = None


def reference(value: Any) -> Reference:
    """'path@revision+adapter', or the same as a mapping with model and lora.  Raises ValueError."""
    words: list[Any] = value.split("+") if isinstance(value, str) else [value]
    if isinstance(value, Mapping):
        for key in value.keys() - {"model", "lora"}:
            raise ValueError(f"unknown key {key!r}{did_you_mean(str(key), ('model', 'lora'))}")
        words = [value.get("model"), *([value["lora"]] if value.get("lora") is not None else [])]
    paths = [_path(word) for word in words]
    if len(paths) > 2 or None in paths:
        raise ValueError(f"{value!r} is not a model; write path[@revision][+adapter]")
    return Reference(*map(str, paths))


def _path(word: Any) -> str | None:
    """'path@revision' of a word, or of {path, revision}."""
    if isinstance(word, Mapping) and isinstance(word.get("path"), str):
        revision = word.get("revision")
        return f"{word['path']}@{revision}" if revision is not None else word["path"]
    return word if isinstance(word, str) and word.strip() else None


def _named(value: Any) -> Reference | None:
    """The model that a value names; None where it names none, which is a fault by type."""
    try:
        return reference(value) if value is not None else None
    except ValueError:
        return None


def _dtype(value: Any) -> str:
    word = str(value).removeprefix("torch.")
    if word not in _DTYPES:
        raise ValueError(f"unknown dtype {value!r}{did_you_mean(word, _DTYPES)}")
    return word


Named = Annotated[Any, PlainValidator(reference)]
Dtype = Annotated[str, BeforeValidator(_dtype)]


@dataclass
class Dialect(Reading):
    """The reading of one config: its method, its base model, and what keys a recipe has."""

    method: str = ""
    known: Known | None = None
    base: Reference | None = None
    native: Collection[str] = ()

    @classmethod
    def of(cls, tree: Mapping[str, Any], native: Collection[str] = ()) -> Dialect:
        method = str(tree.get("merge_method"))
        return cls(method=method, known=METHODS.get(method), base=_named(tree.get("base_model")), native=native)


class _Level(Grammar):
    """What has parameters of the method."""

    parameters: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        values = tree.get("parameters")
        assert isinstance(reading, Dialect)
        if reading.known is None or not isinstance(values, Mapping):
            return
        settings = reading.known.settings
        for name, value in values.items():
            here = ("parameters", name)
            if name not in settings:
                takes = did_you_mean(str(name), settings) or "; it takes none"
                yield Fault(here, f"{reading.method} has no parameter {name!r}, mergekit would ignore it{takes}")
                continue
            try:
                native_value(name, settings[name], [Level({name: value}, ("parameters",))], Window())
            except Bad as bad:
                yield Fault(bad.location, f"{name}: {bad.text}")


class Input(_Level):
    """A model of a merge, or of a slice: then with its layers."""

    model: Named = Field(examples=["PATH"])

    @classmethod
    def hint(cls, key: str, reading: Reading) -> str:
        known = reading.known.settings if isinstance(reading, Dialect) and reading.known is not None else {}
        return f"; {key!r} belongs under parameters" if key in known else super().hint(key, reading)


class Source(Input):
    layer_range: BlockRange = Field(examples=["[0, 16]"])


def _misplaced(inputs: Any, location: str, base: Reference | None, reading: Dialect) -> Iterator[Fault]:
    """Parameters that mergekit ignores where they stand with a model."""
    for i, entry in enumerate(inputs if isinstance(inputs, list) and reading.known is not None else ()):
        own = entry.get("parameters") if isinstance(entry, Mapping) else None
        for name in own if isinstance(own, Mapping) else ():
            setting = reading.known.settings.get(name) if reading.known is not None else None
            here = (location, i, "parameters", name)
            if setting is not None and setting.scope == "shared":
                yield Fault(here, f"{name} is one for all models, mergekit would ignore it here; "
                                  "move it to the parameters of the whole merge")  # fmt: skip
            elif setting is not None and setting.scope == "model" and base and base == _named(entry.get("model")):
                yield Fault(here, f"the base model has no {name}, mergekit would ignore it; leave it out")


class Slice(_Level):
    """Layers of the result, and the models that they are merged from."""

    sources: Annotated[tuple[Source, ...], listed("sources", 1)] = Field(
        examples=["[{model: PATH, layer_range: [0, 16]}]"]
    )
    base_model: Named = None

    @property
    def length(self) -> int:
        start, end = self.sources[0].layer_range
        return end - start

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        yield from super().faults(tree, reading)
        assert isinstance(reading, Dialect)
        sources = [s for s in tree.get("sources") or () if isinstance(s, Mapping)]
        base = _named(tree.get("base_model")) or reading.base
        yield from _misplaced(tree.get("sources"), "sources", base, reading)
        ranges = [s["layer_range"] for s in sources if isinstance(s.get("layer_range"), list)]
        lengths = [r[1] - r[0] for r in ranges if len(r) == 2 and all(type(n) is int for n in r)]
        if len(set(lengths)) > 1:
            yield Fault((), f"the sources of a slice must have equally many layers; these have {lengths}")
        counted = reading.known is None or reading.known.base == "counted"
        if base is not None and not counted and base not in [_named(s.get("model")) for s in sources]:
            yield Fault(("sources",), f"base_model {base.model} is not among the sources of this slice; list it, "
                                      "with the layers to compare with")  # fmt: skip


class Part(_Level):
    """Whole models, or slices: of a module, or of the whole."""

    models: Annotated[tuple[Input, ...], listed("models")] = ()
    slices: Annotated[tuple[Slice, ...], listed("slices")] = ()
    ONE_OF: ClassVar[Sequence[str]] = ("models", "slices")

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        yield from super().faults(tree, reading)
        assert isinstance(reading, Dialect)
        yield from _misplaced(tree.get("models"), "models", reading.base, reading)
        given = [word for word in cls.ONE_OF if tree.get(word)]
        if len(given) != 1:
            words = ", ".join(cls.ONE_OF[:-1])
            yield Fault((given[1],) if given else (), f"there must be exactly one of {words} and {cls.ONE_OF[-1]}")


class Tokens(Grammar):
    """The tokenizer of the result."""

    source: Any = None
    tokens: dict[str, Any] = Field(default_factory=dict)
    pad_to_multiple_of: Any = None


class Config(Part):
    """One merge of mergekit's."""

    ROOT: ClassVar[str] = "the config"
    ONE_OF: ClassVar[Sequence[str]] = ("models", "slices", "modules")

    merge_method: str
    modules: dict[str, Part] = Field(default_factory=dict)
    base_model: Named = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: Any = None
    tokenizer: Tokens | None = None
    chat_template: Any = None
    name: Any = None

    @classmethod
    def hint(cls, key: str, reading: Reading) -> str:
        if isinstance(reading, Dialect) and key in reading.native:
            return f'; mergekit has no such key: pass --set {key}=..., or write it in what "weightsmith convert" prints'
        return super().hint(key, reading)

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        assert isinstance(reading, Dialect)
        yield from super().faults(tree, reading)
        if reading.known is None:
            yield Fault(
                ("merge_method",), f"unknown merge_method {reading.method!r}{did_you_mean(reading.method, METHODS)}"
            )
        elif reading.known.base == "required" and tree.get("base_model") is None:
            yield Fault(("merge_method",), f"{reading.method} needs base_model: PATH")
        if tree.get("tokenizer") is not None and tree.get("tokenizer_source") is not None:
            yield Fault(("tokenizer_source",), "tokenizer and tokenizer_source cannot both be there; keep tokenizer")
