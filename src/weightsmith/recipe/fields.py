"""Types of fields that several models share: words, blocks, paths, stages, values that depend on the tensor."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.keys import DTYPES, RULE_ROLES
from weightsmith.core.method import registry
from weightsmith.core.parameter import plain_number
from weightsmith.recipe import table
from weightsmith.recipe.aliases import expand
from weightsmith.recipe.grammar import PYTHON, Fault, Grammar, Reading, kind_of, mapping
from weightsmith.recipe.reader import Location

__all__ = ["OUTSIDE", "BlockRange", "Case", "Located", "Selector", "StageSpec", "Stages", "Values", "Words", "plain"]

KEEP = "keep"
"""The one-word treatment of a rule that takes the base's tensor."""
OUTSIDE = "outside"
"""As `layers`: the tensors outside the blocks (embeddings, final norm, head)."""


def _words(value: Any) -> Any:
    """One word stands for a list of one."""
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) for w in words):
        raise ValueError(f"should be a word or a list of words, is {value!r}")
    return tuple(words)


def _roles(value: Any) -> Any:
    words = _words(value)
    for role in words:
        if role not in RULE_ROLES:
            raise ValueError(f"unknown role {role!r}{did_you_mean(role, RULE_ROLES)}")
    return words


def _block_range(value: Any) -> Any:
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) is int for v in value)
    if not good or not 0 <= value[0] < value[1]:
        raise ValueError(f"should be two block numbers [start, end] with 0 <= start < end, is {value!r}")
    return tuple(value)


def _blocks(value: Any) -> Any:
    try:
        return value if value == OUTSIDE else _block_range(value)
    except ValueError as error:
        raise ValueError(f"{error}; {OUTSIDE!r} means the tensors outside the blocks") from None


def plain(value: Any) -> Any:
    """A value as YAML would give it (a ramp is a list, NumPy's numbers are numbers): equal recipes compare equal."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else plain_number(value)


def _values(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"should be a mapping of parameters, is {value!r}")
    reading: Reading = info.context or PYTHON
    return {name: _with_files(name, one, reading) for name, one in plain(value).items()}


def _with_files(name: str, value: Any, reading: Reading) -> Any:
    """The value, whose files of coefficients are there and known by their hashes."""
    if (path := table.file_of(value)) is not None:
        try:
            return table.checked(name, value, reading.located(path))
        except ValueError as error:
            raise Fault((name,), str(error)).error() from None
    if isinstance(value, Mapping):
        return {key: _with_files(name, one, reading) for key, one in value.items()}
    return [_with_files(name, one, reading) for one in value] if isinstance(value, list) else value


def _located(value: Any, info: ValidationInfo) -> Any:
    """Paths that exist beside the file are meant relative to it."""
    reading: Reading = info.context or PYTHON
    return reading.located(value) if isinstance(value, str) else tuple(map(reading.located, value))


def listed(what: str, least: int = 0) -> BeforeValidator:
    """The validator of a field that is a list."""

    def check(value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) < least:
            raise ValueError(f"should be a list of {what}, each with a dash, is {kind_of(value)}")
        return tuple(value)

    return BeforeValidator(check)


def named(what: str, example: str = "") -> BeforeValidator:
    """The validator of a field that is a mapping from names, at least one."""

    def check(value: Any) -> Any:
        if value is None or value in ({}, []):
            raise ValueError(f"is empty; name at least one{example}")
        if not isinstance(value, Mapping):
            raise ValueError(f"should be a mapping from names to {what}{example}; is {kind_of(value)}")
        return value

    return BeforeValidator(check)


_WORD_OR_WORDS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_ROLE_OR_ROLES = {"anyOf": [{"enum": list(RULE_ROLES)}, {"type": "array", "items": {"enum": list(RULE_ROLES)}}]}
_TWO_NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}


def _dtype(words: Sequence[str]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in words:
            raise ValueError(f"unknown dtype {value!r}{did_you_mean(value, words)}")
        return value

    return AfterValidator(check)


_FLOATS = [d.name for d in DTYPES.values() if d.floating]
_WIDE = [d.name for d in DTYPES.values() if d.floating and d.itemsize > 1]

Dtype = Annotated[str, _dtype(_FLOATS), WithJsonSchema({"enum": _FLOATS})]
WideDtype = Annotated[str, _dtype(_WIDE), WithJsonSchema({"enum": _WIDE})]
"""Floating dtypes of more than a byte: those that can be computed with."""

Words = Annotated[tuple[str, ...], BeforeValidator(_words), WithJsonSchema(_WORD_OR_WORDS)]
Roles = Annotated[tuple[str, ...], BeforeValidator(_roles), WithJsonSchema(_ROLE_OR_ROLES)]
Located = Annotated[str, AfterValidator(_located)]
LocatedWords = Annotated[Words, AfterValidator(_located)]
BlockRange = Annotated[tuple[int, int], BeforeValidator(_block_range), WithJsonSchema(_TWO_NUMBERS)]
Blocks = Annotated[
    tuple[int, int] | Literal["outside"],
    BeforeValidator(_blocks),
    WithJsonSchema({"anyOf": [_TWO_NUMBERS, {"enum": [OUTSIDE]}]}),
]
Values = Annotated[dict[str, Any], BeforeValidator(_values)]


class WithParameters(Grammar):
    """A model by its path or name, with values of method parameters for this model alone as further keys."""

    model_config = ConfigDict(extra="allow")
    SHORT: ClassVar[str] = "model"

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if not isinstance(given, Mapping):
            return super().long_form(given, reading)
        return {k: v if k in cls.model_fields else plain(v) for k, v in given.items()}, {}

    @property
    def parameters(self) -> dict[str, Any]:
        """This model's own values of method parameters."""
        return dict(self.model_extra or {})

    @classmethod
    def own(cls, ref: Any) -> dict[str, Any]:
        """The parameters that stand with a model, as written."""
        if isinstance(ref, WithParameters):
            return ref.parameters
        return {k: v for k, v in mapping(ref).items() if k not in cls.model_fields}


class StageSpec(Grammar):
    """One stage of the method: its name and the parameters written inside it."""

    name: str
    parameters: Values = Field(default_factory=dict)

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if isinstance(given, str):
            return {"name": given}, {"name": ()}
        if isinstance(given, Mapping) and "name" in given:
            return given, {}
        if isinstance(given, Mapping) and len(given) == 1:
            ((name, parameters),) = given.items()
            if not isinstance(parameters, Mapping) and parameters is not None:
                raise ValueError(_as_mapping(str(name), parameters))
            return {"name": name, "parameters": parameters}, {"name": (), "parameters": (name,)}
        raise ValueError("should name one method per stage; "
                         "write one as {ties: {density: 0.3}}, several as a list: [dare, ties]")  # fmt: skip


def _as_mapping(stage: str, value: Any) -> str:
    """What is wrong with a value where the parameters of a stage belong, with how its first parameter is written."""
    try:
        first = next((parameter.name for parameter in registry(stage).parameters()), "")
    except RecipeError:  # which is said by itself
        first = ""
    hint = f"; write {{{stage}: {{{first}: {json.dumps(value, default=repr)}}}}}" if first else ""
    return f"{stage} should be a mapping of parameters, is {value!r}{hint}"


def _stages(value: Any, info: ValidationInfo) -> Any:
    """One stage stands for a list of one."""
    if not isinstance(value, (list, tuple)):
        return (StageSpec.model_validate(value, context=info.context),)
    if not value:
        raise ValueError("is an empty list; name a method")
    return tuple(value)


def _expanded(stages: tuple[StageSpec, ...]) -> tuple[StageSpec, ...]:
    """The name of a pipeline stands for its stages."""
    return tuple(StageSpec(name=n, parameters=p) for s in stages for n, p in expand(s.name, s.parameters))


Stages = Annotated[tuple[StageSpec, ...], BeforeValidator(_stages), AfterValidator(_expanded)]


class Selector(Grammar):
    """Which tensors are meant: all conditions hold."""

    match: Words = Field(default=("*",), description="globs over tensor names")
    role: Roles | None = Field(
        default=None, description="roles (q, k, v, o, gate, up, down, embed, head, norm, bias, vision, connector, ...)"
    )
    layers: Blocks | None = Field(
        default=None, description="blocks start..end, the end not included; or 'outside' the blocks"
    )
    optional: bool = Field(default=False, description="that no tensor is meant is a warning, no problem")


class Case(Selector):
    """A value for some tensors; in a list of cases the first that matches counts."""

    value: Any = Field(examples=["0.5"], description="a number, a ramp, or null: no tensor may get this far")
