"""What `weightsmith train` is to do: a frozen value, from YAML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, WrapValidator

from weightsmith.core.errors import did_you_mean
from weightsmith.recipe.fields import Located, Words
from weightsmith.recipe.grammar import Fault, Grammar, Reading
from weightsmith.recipe.load import read_file, read_text
from weightsmith.recipe.reader import Location

__all__ = ["AdamW", "Clip", "OneOf", "Optimizer", "Schedule", "Timing", "TrainRecipe", "load", "loads", "null_clip"]


class OneOf(Grammar):
    """A mapping with exactly one of the fields; one word stands for a field with all its defaults."""

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if isinstance(given, str) and given not in cls.model_fields:
            raise ValueError(f"names no kind, is {given!r}{did_you_mean(given, cls.model_fields)}")
        return ({given: {}}, {given: ()}) if isinstance(given, str) else (given, {})

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterable[Fault]:
        if len(tree) != 1:
            yield Fault((), f"should name one of {', '.join(cls.model_fields)}, with its values inside it", "value")

    @property
    def chosen(self) -> tuple[str, Grammar]:
        """The name of the field and its value."""
        return next((name, value) for name in type(self).model_fields if (value := getattr(self, name)) is not None)


class AdamW(Grammar):
    """torch's AdamW."""

    lr: float = Field(default=1e-4, gt=0, description="learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices; vectors get none")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")


class DctAdamw(AdamW):
    """`train.optim.DCTAdamW`."""

    rank: int = Field(default=128, ge=1, description="kept directions; matrices with a smaller side get AdamW")
    basis: Literal["dct3", "dct2", "random"] = Field(default="dct3", description="what the directions are chosen from")
    norm: Literal[1, 2] = Field(default=1, description="by which directions are ranked")
    interval: int = Field(default=1, ge=1, description="steps between two choices of directions")
    rotate: bool = Field(default=True, description="let moments follow their directions")
    error_feedback: Literal[False, True, 4, 8] = Field(
        default=False, description="keep what is left out: in full, 8, 4"
    )


class Trion(Grammar):
    """`train.optim.Trion`."""

    lr: float = Field(default=0.02, gt=0, description="learning rate of matrices")
    adam_lr: float = Field(default=3e-4, gt=0, description="learning rate of vectors, embeddings and heads")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="of the gradient")
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices; vectors get none")
    rank: int = Field(default=128, ge=1, description="kept directions; matrices with a smaller side get AdamW")
    scale: Literal["original", "match_rms_adamw", "dion", "none"] = Field(
        default="original", description="length of an update"
    )


class Optimizer(OneOf):
    """One optimizer."""

    adamw: AdamW | None = Field(default=None, description="torch's AdamW")
    dct_adamw: DctAdamw | None = Field(default=None, description="its moments in a subspace")
    trion: Trion | None = Field(default=None, description="low-rank Muon")


class Full(Grammar):
    """Every parameter trains; the result is a model."""


class Svfit(Grammar):
    """The leading singular values train; the result is an adapter."""

    r: int | None = Field(default=None, ge=1, description="singular values per layer; neither: all")
    energy: float | None = Field(default=None, gt=0, le=1, description="in place of r: share of their sum to reach")
    target_modules: Words | None = Field(default=None, description="ends of names of layers; default: query and value")
    modules_to_save: Words = Field(default=(), description="ends of names of modules that train whole")
    parametrize: Literal["delta", "value", "log"] = Field(default="delta", description="what trains of each value")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on the input of the trained part")
    bases: bool = Field(default=False, description="store the singular vectors too")

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterable[Fault]:
        if tree.get("r") is not None and tree.get("energy") is not None:
            yield Fault((), "takes r or energy, not both", "value")


class Linear(Grammar):
    """The model linearised around its weights trains (arXiv:2305.12827); the result says so, and merges heed it."""

    rank: int | None = Field(default=None, ge=1, description="of the changes: an adapter (L-LoRA); default: full")
    modules: str | None = Field(default=None, description="regular expression of names of modules; default: all")

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterable[Fault]:
        if isinstance(given := tree.get("modules"), str):
            try:
                re.compile(given)
            except re.error as error:
                yield Fault(("modules",), f"is no regular expression: {error}", "value")


class Tune(OneOf):
    """What trains."""

    full: Full | None = Field(default=None, description="every parameter")
    svfit: Svfit | None = Field(default=None, description="singular values")
    linear: Linear | None = Field(default=None, description="the model's tangent space")


def _in_one_line(given: Any, handler: Callable[[Any], Any]) -> Any:
    try:
        return handler(given)
    except ValidationError:
        raise ValueError(f"should be a number above 0, or none; is {given!r}") from None


Clip = Annotated[Annotated[float, Field(gt=0)] | Literal["none"], WrapValidator(_in_one_line)]


def null_clip(given: Any) -> Any:
    """`clip: null` says none: a key without a value would leave the default."""
    return {**given, "clip": "none"} if isinstance(given, Mapping) and given.get("clip", 0) is None else given


class Timing(Grammar):
    """How long and how fast: what all runs have in common."""

    steps: int = Field(default=1000, ge=1, description="of the optimizer")
    batch: int = Field(default=8, ge=1, description="examples of one forward pass")
    accumulation: int = Field(default=1, ge=1, description="forward passes of one step")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="linear", description="of the learning rate")
    warmup: float = Field(default=0.03, ge=0, lt=1, description="share of the steps in which the rate grows from 0")
    clip: Clip = Field(default=1.0, description="largest norm of the gradient, or none")
    every: int = Field(default=100, ge=1, description="steps between two checkpoints, which are also validated")


class Schedule(Timing):
    """Also on how much of the data: what runs with one file of examples have in common."""

    valid: float = Field(default=0.05, ge=0, lt=1, description="share of the examples kept for validation")
    examples: int = Field(default=1_000_000, ge=1, description="at most so many are read")
    length: int = Field(default=512, ge=2, description="tokens of an example")
    field: str | None = Field(default=None, description="which field of a .jsonl or .npz to read")
    bf16: bool = Field(default=False, description="run the model under bfloat16 autocast")
    seed: int = Field(default=0, ge=0, description="of the order, the validation set, and dropout")

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        return super().long_form(null_clip(given), reading)


class TrainRecipe(Schedule):
    """One model, one file of examples, what trains, and how long."""

    ROOT: ClassVar[str] = "the recipe"

    model: Located = Field(description="folder or hub id[@revision]", examples=["PATH"])
    data: Located = Field(description=".txt, .jsonl, .npz, or a folder of texts or images", examples=["texts.jsonl"])
    tune: Tune = Field(default=Tune(full=Full()), description="what trains: full, svfit or linear")
    optimizer: Optimizer = Field(default=Optimizer(adamw=AdamW()), description="adamw, dct_adamw or trion")


def load(path: str | Path, overrides: Sequence[str] = (), files: list[Path] | None = None) -> TrainRecipe:
    """Read a recipe; see `weightsmith.recipe.load.read_file`."""
    return read_file(TrainRecipe, path, overrides, files)


def loads(text: str, where: str = "recipe", overrides: Sequence[str] = (), folder: Path | None = None) -> TrainRecipe:
    """Read a recipe from text; see `weightsmith.recipe.load.read_text`."""
    return read_text(TrainRecipe, text, where, overrides, folder)
