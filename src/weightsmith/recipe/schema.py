"""The recipe: what the user asked for, as a frozen value.  YAML, JSON and Python make the same one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from weightsmith.core.errors import did_you_mean
from weightsmith.core.keys import DTYPES, RULE_ROLES
from weightsmith.core.units import parse_size
from weightsmith.recipe.aliases import expand

if TYPE_CHECKING:
    from weightsmith.jobs.job import Result

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
]  # fmt: skip

OUTSIDE = "outside"
"""As `layers`: the tensors outside the blocks (embeddings, final norm, head)."""


def _words(value: Any) -> Any:
    """One word stands for a list of one."""
    if value is None:
        return None  # for fields that may be absent
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) for w in words):
        raise ValueError(f"should be a word or a list of words, is {value!r}")
    return tuple(words)


def _block_range(value: Any) -> Any:
    if value is None or value == OUTSIDE:
        return value
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) is int for v in value)
    if not good or not 0 <= value[0] < value[1]:
        raise ValueError(f"should be two block numbers [start, end] with 0 <= start < end, is {value!r}")
    return tuple(value)


def _plain(value: Any) -> Any:
    """Parameter values as YAML would give them (a ramp is a list), so that equal recipes compare equal."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
BlockRange = Annotated[tuple[int, int] | None, BeforeValidator(_block_range)]
Blocks = Annotated[tuple[int, int] | Literal["outside"] | None, BeforeValidator(_block_range)]
Values = Annotated[dict[str, Any], BeforeValidator(_plain)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelRef(BaseModel):
    """One input: a path, a hub id with @revision, a LoRA adapter on `base`, a nested recipe, slices or modules.

    Any further key is a parameter of the method for this model alone (weight, density, ...).
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    model: Annotated[
        str | Recipe | Slices | Modules, Field(description="path, hub id[@revision], nested recipe, slices or modules")
    ]
    adapter: str | None = Field(default=None, description="LoRA adapter that is put on it first")
    stats: Words = Field(default=(), description="folders written by `weightsmith observe` for this model")
    layers: BlockRange = Field(default=None, description="take blocks start..end only, the end not included")
    stack: str | None = Field(
        default=None, description="which blocks `layers` counts (model.decoder.layers), where a model has several kinds"
    )
    expert: str | None = Field(default=None, description="which model of a compressed folder")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str) or is_composed(value):
            return {"model": value}
        if isinstance(value, dict):
            return {k: v if k in cls.model_fields else _plain(v) for k, v in value.items()}
        return value

    @property
    def parameters(self) -> dict[str, Any]:
        """This model's own values of method parameters."""
        return dict(self.model_extra or {})


def is_composed(value: Any) -> bool:
    """Whether a mapping is a model made of models (a recipe, slices, modules) rather than an entry with parameters."""
    return isinstance(value, dict) and any(word in value for word in ("models", "slices", "modules"))


class Slices(_Frozen):
    """Slices of models, one on top of the other: each with its `layers`; a slice may be a recipe of its own."""

    slices: tuple[ModelRef, ...] = Field(min_length=1, description="from the first block to the last")

    @field_validator("slices", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"should be a list of models, each with a dash, is {value!r}")
        return tuple(value)


class Module(_Frozen):
    """Part of a model, by the names of its tensors, and where it is taken from."""

    match: Words = Field(default=("*",), description="globs over tensor names; the first module that matches has them")
    model: ModelRef = Field(description="a model, or a recipe that makes these tensors")


class Modules(_Frozen):
    """A model put together of modules (vision tower, text decoder, ...), each with a model or a recipe of its own."""

    modules: dict[str, Module] = Field(min_length=1, description="name -> tensors and model")


class StageSpec(_Frozen):
    """One stage of the method: its name and the parameters written inside it."""

    name: str
    parameters: Values = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            ((name, parameters),) = value.items()
            return {"name": name, "parameters": parameters or {}}
        return value


def _stages(value: Any) -> Any:
    """One stage stands for a list of one, the name of a pipeline for its stages."""
    stages = [StageSpec.model_validate(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    return tuple(StageSpec(name=n, parameters=p) for s in stages for n, p in expand(s.name, s.parameters))


Stages = Annotated[tuple[StageSpec, ...], BeforeValidator(_stages)]


class Rule(_Frozen):
    """Another method or other parameters for some tensors.  The first rule that matches a tensor wins."""

    match: Words = Field(default=("*",), description="globs over tensor names")
    role: Words | None = Field(
        default=None, description="roles (q, k, v, o, gate, up, down, embed, head, norm, bias, vision, connector, ...)"
    )
    layers: Blocks = Field(default=None, description="blocks start..end, the end not included; or 'outside' the blocks")
    method: Stages | None = Field(default=None, description="method or pipeline; 'keep' takes the base's tensor")
    parameters: Values = Field(default_factory=dict)

    @field_validator("role")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for role in value or ():
            if role not in RULE_ROLES:
                raise ValueError(f"unknown role {role!r}{did_you_mean(role, RULE_ROLES)}")
        return value


class Output(_Frozen):
    """How the result is stored."""

    dtype: str | None = Field(default=None, description="float32, bfloat16, ...; default: as the base stores it")
    shard_size: str | int = Field(default="5GB", description="largest size of one safetensors file")

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        floats = [d.name for d in DTYPES.values() if d.floating]
        if value is not None and value not in floats:
            raise ValueError(f"unknown dtype {value!r}{did_you_mean(value, floats)}")
        return value

    @field_validator("shard_size")
    @classmethod
    def _size(cls, value: str | int) -> str | int:
        if parse_size(value) < 1:
            raise ValueError("shard_size must be positive")
        return value


class Tokenizer(_Frozen):
    """Whose tokenizer the result has, and what becomes of tokens that not all models have."""

    source: str = Field(description="'base', 'union', a model's name, or a folder")
    tokens: Values = Field(default_factory=dict, description="token -> {source: where its row comes from, force: ...}")
    pad_to_multiple_of: int | None = Field(default=None, gt=0, description="rows of the embeddings are padded to that")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @property
    def plain(self) -> bool:
        """Whether it only says whose files go along."""
        return self.source != "union" and not self.tokens and self.pad_to_multiple_of is None


class Recipe(_Frozen):
    """Models in, one model out.

    `method` is a name, or a list of stages: `[{dare: {density: 0.5}}, ties, lines]`.
    `parameters` go to the stage that has a field of that name; a value may be a number, a list of
    numbers (a ramp over depth), a mapping from model names to either, or a list of cases by tensor
    (`[{match: "*mlp*", value: 0.3}, 0.5]`: the first that matches).
    """

    base: ModelRef | None = Field(default=None, description="the model the experts were fine-tuned from")
    models: dict[str, ModelRef] = Field(description="name -> model, in order")
    method: Stages = Field(description="method or pipeline")
    parameters: Values = Field(default_factory=dict)
    rules: tuple[Rule, ...] = Field(default=(), description="exceptions; the first match wins")
    exclude: Words = Field(default=(), description="globs of tensors taken unchanged from the base (or first model)")
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

    @field_validator("rules", mode="before")
    @classmethod
    def _rules(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"should be a list of rules, each with a dash, is {value!r}")
        return tuple(value)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a YAML or JSON file; see `weightsmith.recipe.load.load`."""
        from weightsmith.recipe.load import load  # it builds recipes, so it imports this file

        return load(path, overrides)

    def run(self, out: str | Path, **options: Any) -> Result:
        """Merge into a folder; the options are the fields of `Settings` (memory, threads, device, resume, ...)."""
        from weightsmith.jobs.merge import run  # the one upward import, and only when asked to run

        return run(self, Path(out), **options)


for _model in (Slices, Module, Modules, ModelRef, Recipe):
    _model.model_rebuild()
