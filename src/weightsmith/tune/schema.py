"""TUNE.yaml: a recipe, what is learned of it, and from what; the same grammar as recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from weightsmith.core.errors import RecipeError, did_you_mean, problems_of
from weightsmith.recipe.check import stages_written
from weightsmith.recipe.fields import Located, named
from weightsmith.recipe.grammar import PYTHON, Fault, Grammar, Reading, inside, mapping
from weightsmith.recipe.load import read_file, read_text
from weightsmith.recipe.reader import Location
from weightsmith.recipe.schema import Recipe, missing_inputs
from weightsmith.tune.descent import Descent
from weightsmith.tune.objective import Objective
from weightsmith.tune.registry import make
from weightsmith.tune.setting import Preset, Setting
from weightsmith.tune.space import Free

__all__ = ["Chosen", "TaskData", "TuneFile", "load", "loads", "recipe_or_path"]


def recipe_or_path(value: Any, info: ValidationInfo) -> Any:
    """A recipe as it is, or the path of one."""
    reading: Reading = info.context or PYTHON
    if not isinstance(value, str):
        return value
    if reading.nested is None:
        raise ValueError(f"should be a recipe, is {value!r}")
    try:
        return reading.nested(reading.located(value))
    except RecipeError as error:
        raise Fault((), "\n".join(map(str, error.problems)), "nested").error() from None


class TaskData(Grammar):
    """The data of one task: .txt, .jsonl, .npz, or a folder of texts or images, as `weightsmith observe` reads them."""

    SHORT: ClassVar[str] = "train"

    train: Located = Field(description="what is learned from", examples=["FILE"])
    validation: Located | None = Field(default=None, description="other data, to choose the best step by")
    field: str | None = Field(default=None, description="which field of a .jsonl or .npz to read")


class Chosen(Grammar):
    """Something by its name, or by its name with options."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if isinstance(given, str):
            return {"name": given}, {"name": ()}
        if isinstance(given, Mapping) and len(given) == 1:
            ((name, options),) = given.items()
            return {"name": name, "options": options or {}}, {"name": (), "options": (name,)}
        raise ValueError("should be one name, or one name with its options, as {adamerging: {steps: 200}}")


class FreeNumbers(Grammar):
    """What is learned of one parameter; see `tune.space.Free`."""

    SHORT: ClassVar[str] = "per"

    per: Literal["model", "layer", "tensor", "chunk", "group", "entry"] = "tensor"
    parts: int | dict[str, int] = 1
    start: float | dict[str, float] = 0.3
    link: Literal["identity", "clamp", "sigmoid", "softmax", "concrete"] = "identity"
    low: float | None = None
    high: float | None = None
    shared: bool = False
    temperature: float = 0.5
    seed: int = 0


class Steps(Grammar):
    """How the numbers move; see `tune.descent.Descent`."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    steps: int = 500
    accumulate: int = 1
    weight_decay: float = 0.0
    momentum: float = 0.0
    clip: float = 0.0
    schedule: Literal["constant", "cosine", "restarts"] = "constant"


class TuneFile(Grammar):
    """A recipe, and the numbers of it that are learned from data.

    `preset` names a published system; or `free` and `objective` say what is learned and what is minimised.
    """

    ROOT: ClassVar[str] = "the tuning"

    recipe: Annotated[Recipe, BeforeValidator(recipe_or_path)] = Field(
        description="a recipe or its path", examples=["recipe.yaml"]
    )
    preset: Chosen | None = Field(default=None, description="a preset, or {preset: {option: value}}")
    free: dict[str, FreeNumbers] = Field(default_factory=dict, description="parameter -> what is learned of it")
    objective: Chosen | None = Field(
        default=None, description="what is minimised; beside a preset, in place of its own"
    )
    descent: Steps | None = Field(default=None, description="how; beside a preset, what differs from its own")
    data: Annotated[dict[str, TaskData], named("data", ", as math: math.jsonl")] = Field(
        description="task -> data", examples=["{math: math.jsonl}"]
    )
    kind: str = Field(default="auto", description="causal-lm, image-classification, ...; default: as config.json says")
    batch: int = Field(default=16, ge=1, description="examples per batch")
    examples: int = Field(default=256, ge=1, description="examples of each file")
    length: int = Field(default=256, ge=2, description="tokens per example")
    held_back: float = Field(default=0.0, ge=0, lt=1, description="share of the examples that validate, without a file")
    every: int = Field(default=10, ge=1, description="steps between two looks at the validation data")
    controls: bool = Field(default=True, description="measure beside it the untuned recipe, one lambda, random changes")
    gather: bool = Field(default=False, description="contract a step's gradients at once: faster, one more module")
    seed: int = Field(default=0, description="of the choice of examples")

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        for kind, what in ((Preset, "preset"), (Objective, "objective")):
            yield from _not_made(kind, what, tree.get(what))
        stages = stages_written(mapping(tree.get("recipe")).get("method"))
        known = {p.name for stage in stages.values() for p in stage.parameters()} | {"lambda", "weight"}
        for name in mapping(tree.get("free")) if stages else ():
            if name not in known:
                text = (
                    f"free: no stage of {' | '.join(stages)} has a parameter {name!r}{did_you_mean(str(name), known)}"
                )
                yield Fault(("free", name), text)
        if tree.get("preset") is None and not tree.get("free"):
            yield Fault((), "says not what to learn; add preset: adamerging, or free: and objective:", "lacking")
        if tree.get("preset") is not None and tree.get("free"):
            yield Fault(("free",), "stands beside a preset, which has its own; keep one of them", "value")
        if tree.get("free") and tree.get("preset") is None and tree.get("objective") is None:
            yield Fault((), "has 'free' without an objective; add objective: entropy", "lacking")
        for task, data in mapping(tree.get("data")).items():
            for part, path in (data if isinstance(data, Mapping) else {"train": data}).items():
                if part != "field" and isinstance(path, str) and not Path(reading.located(path)).exists():
                    yield Fault(("data", task, part), f"no file or folder {path!r}")
            if (
                isinstance(data, Mapping)
                and data.get("validation") is not None
                and data.get("validation") == data.get("train")
            ):
                yield Fault(("data", task, "validation"), "is the data that is learned from; give other data", "value")

    @classmethod
    def not_there(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        yield from inside("recipe", missing_inputs(tree.get("recipe"), reading))

    def setting(self) -> Setting:
        """The three parts; RecipeError for unknown names and options."""
        models = tuple(self.recipe.models)
        objective = None
        if self.objective is not None:
            objective = make(Objective, "objective", self.objective.name, self.objective.options)  # type: ignore[type-abstract]
        if self.preset is not None:
            made = make(Preset, "preset", self.preset.name, self.preset.options).setting(models)  # type: ignore[type-abstract]
            made = made if objective is None else dataclasses.replace(made, objective=objective)
        else:
            assert objective is not None
            made = Setting({name: Free(**dict(free)) for name, free in self.free.items()}, objective)
        if self.descent is not None:
            changes = {name: getattr(self.descent, name) for name in self.descent.model_fields_set}
            made = dataclasses.replace(made, descent=dataclasses.replace(made.descent or Descent(), **changes))
        return dataclasses.replace(made, gather=self.gather)


def _not_made(kind: Any, what: str, value: Any) -> Iterator[Fault]:
    """What is wrong with the name and options of a preset or an objective."""
    named = {value: {}} if isinstance(value, str) else mapping(value)
    if len(named) != 1 or isinstance(value, Chosen):
        return  # a fault of its own
    ((name, options),) = named.items()
    try:
        make(kind, what, str(name), mapping(options))
    except RecipeError as error:
        yield from (Fault((what,), problem.text) for problem in problems_of(error))
    except (TypeError, ValueError) as error:
        yield Fault((what,), f"{what} {name}: {error}")


def load(path: str | Path, overrides: Sequence[str] = (), files: list[Path] | None = None) -> TuneFile:
    """Read a tuning; see `weightsmith.recipe.load.read_file`."""
    return read_file(TuneFile, path, overrides, files)


def loads(text: str, where: str = "tuning", folder: Path | None = None) -> TuneFile:
    """Read a tuning from text; see `weightsmith.recipe.load.read_text`."""
    return read_text(TuneFile, text, where, (), folder)
