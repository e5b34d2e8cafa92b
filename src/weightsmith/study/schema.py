"""What is to be studied: models, how they are scored, and which methods are tried.  From a YAML or JSON file.

    title: Letters and digits
    base: base.safetensors
    models: {greek: greek.safetensors, digits: digits.safetensors}     # a task is called as its expert is
    joint: joint.safetensors                                           # optional, for comparison
    guards: [latin]                                                    # what else is scored, to see what is forgotten
    score: accuracy, %
    evaluate: {function: {data: /data/letters}}
    methods:                                                           # optional; default: all that apply
      TIES: {ties: {density: [0.2, 0.5], lambda: [0.7, 1.0]}}

Everything but `method` and `parameters` may be set as in a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, PlainValidator, PrivateAttr

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.recipe.aliases import expand
from weightsmith.recipe.check import method_faults
from weightsmith.recipe.fields import Located, Words, named
from weightsmith.recipe.grammar import Fault, Grammar, Reading, mapping
from weightsmith.recipe.load import read_file
from weightsmith.recipe.reader import Location
from weightsmith.recipe.schema import Recipe, missing_inputs
from weightsmith.study.grids import Candidate, candidates

__all__ = ["BUILT_IN", "EXAMPLE", "FUNCTION", "TASKS", "Evaluation", "Study", "grid_faults", "load_study"]

FILE = "study.yaml"
EXAMPLE = ("{base: base, models: {math: math, code: code}, evaluate: {bits_per_byte: {"
           "math: {validation: dev.jsonl, test: test.jsonl}, code: {validation: a.py, test: b.py}}}}")  # fmt: skip
FUNCTION = "function"
TASKS = "tasks"
BUILT_IN = {"bits_per_byte": ("bits per byte", False), "accuracy": ("accuracy, %", True), TASKS: ("score", True)}
"""Evaluators that need no code: name -> (what the score is called, whether higher is better)."""


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty; leave it out or write a text")
    return " ".join(value.split())


def _different(words: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(words)) < len(words):
        raise ValueError(f"should be a list of different words, is {json.dumps(words)}")
    return words


def _file(path: str) -> str:
    if not Path(path).is_file():
        raise ValueError(f"no file {path}")
    return path


def _beside(path: str) -> str:
    if not Path(path).exists():
        raise ValueError(f"no file or folder {path!r} beside the study")
    return path


def _candidates(value: Any) -> tuple[Candidate, ...]:
    """Every combination of the values in one entry's lists."""
    grid: list[tuple[str, Mapping[str, Any]]] = []
    for stage in value if isinstance(value, list) else [value]:
        if isinstance(stage, str):
            grid += expand(stage, {})
        elif isinstance(stage, dict) and len(stage) == 1 and isinstance(next(iter(stage.values())), dict | None):
            ((name, parameters),) = stage.items()
            grid += expand(name, parameters or {})
        else:
            raise ValueError(
                f"a stage is a name, or a name with its parameters, as {{ties: {{density: [0.2, 0.5]}}}}; "
                f"is {json.dumps(stage)[:80]}"
            )
    if empty := [f"{name}.{key}" for name, found in grid for key, values in found.items() if values == []]:
        raise ValueError(f"{empty[0]} is an empty list; give the values to try")
    return candidates(tuple(grid))


Text = Annotated[str, AfterValidator(_text)]
Grid = Annotated[Any, PlainValidator(_candidates)]


class Data(Grammar):
    """The data of one task, for a built-in evaluator: coefficients are chosen on one part, scores are of the other."""

    validation: Annotated[Located, AfterValidator(_file)] = Field(examples=["FILE"])
    test: Annotated[Located, AfterValidator(_file)] = Field(examples=["FILE"])

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        paths = [Path(reading.located(str(tree.get(split)))) for split in ("validation", "test")]
        if all(path.is_file() for path in paths) and paths[0].samefile(paths[1]):
            yield Fault(
                (), "validation and test are the same file; coefficients are never chosen on test data", "value"
            )


class TaskFile(Grammar):
    """Tasks as `weightsmith train multitask` reads them, and whose heads a merged model gets."""

    recipe: Annotated[Located, AfterValidator(_file)] = Field(examples=["TASKS.yaml"])
    own: dict[str, Annotated[Located, AfterValidator(_beside)]] = Field(
        default={}, description="task: the result whose own parts score it; default: its expert, if that is one"
    )


class Evaluation(Grammar):
    """How models are scored: by a function of the user's file, with these arguments, or by a built-in evaluator."""

    function: dict[str, Any] | None = None
    bits_per_byte: dict[str, Data] | None = None
    accuracy: dict[str, Data] | None = None
    tasks: TaskFile | None = None

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        found = {given: {}} if given == FUNCTION else given
        kinds = (FUNCTION, *BUILT_IN)
        if not isinstance(found, Mapping) or len(found) != 1 or next(iter(found)) not in kinds:
            own = isinstance(given, str) and given.endswith(".py")
            hint = f"; write evaluate: {FUNCTION}, and name the file of yours by --evaluator {given}" if own else ""
            raise ValueError(
                f"takes one of {', '.join(kinds)}, as {{bits_per_byte: {{math: {{validation: FILE, test: FILE}}}}}}; "
                f"is {json.dumps(given, default=repr)[:80]}{hint}"
            )
        return {kind: {} if arguments is None else arguments for kind, arguments in found.items()}, {}

    @property
    def kind(self) -> str:
        return next(kind for kind in (FUNCTION, *BUILT_IN) if getattr(self, kind) is not None)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the function; task -> split -> absolute path of the data; the fields of a TaskFile."""
        if self.tasks is not None:
            return self.tasks.model_dump()
        found: dict[str, Any] = getattr(self, self.kind)
        return {key: value.model_dump() if isinstance(value, Data) else value for key, value in found.items()}


class Study(Grammar):
    """One base with one expert per task.  Studies of the same title are repetitions (other seeds) of one another."""

    ROOT: ClassVar[str] = "the study"

    recipe: Recipe = Field(description="all of a merge but its method")
    title: Text
    about: Text = ""
    joint: Annotated[Located, AfterValidator(_beside)] | None = None
    guards: Annotated[Words, AfterValidator(_different)] = ()
    score: Text
    higher_is_better: bool
    evaluate: Evaluation
    methods: Annotated[dict[str, Grid], named("methods", ", as TIES: {ties: {lambda: [0.5, 1]}}")] | None = None
    _file: Path = PrivateAttr(default=Path())

    @property
    def file(self) -> Path:
        return self._file

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.recipe.models)

    @property
    def scored(self) -> tuple[str, ...]:
        """What every evaluation must give a score for."""
        return (*self.tasks, *self.guards)

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        if not isinstance(given, Mapping):
            return given, {}
        evaluate = given.get("evaluate") or FUNCTION
        kind = next(iter(evaluate)) if isinstance(evaluate, Mapping) else evaluate
        score, higher = BUILT_IN.get(kind, ("score", True))
        folder = reading.folder.name if reading.folder is not None else ""
        own = {key: value for key, value in given.items() if key not in _OF_THE_RECIPE and value is not None}
        own = {"title": folder, "evaluate": evaluate, "score": score, "higher_is_better": higher} | own
        recipe = {key: value for key, value in given.items() if key in _OF_THE_RECIPE}
        return own | {"recipe": {**recipe, "method": "linear"}}, {"recipe": ()}

    @classmethod
    def hint(cls, key: str, reading: Reading) -> str:
        known = [*_OF_THE_RECIPE, *(cls.model_fields.keys() - {"recipe"})]
        return "; it is named on the command line: --evaluator FILE" if key == "evaluator" else did_you_mean(key, known)

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        recipe, guards = tree["recipe"], tree.get("guards") or ()
        if recipe.get("base") is None:
            yield Fault((), "a study needs a base: what the experts gained is measured against it")
        tasks = list(recipe["models"]) if isinstance(recipe.get("models"), Mapping) else []
        guards = [guards] if isinstance(guards, str) else guards if isinstance(guards, list) else []
        for guard in guards:
            if guard in tasks:
                yield Fault(("guards",), f"{guard!r} is a task and a guard; a guard is what no expert was trained for")
        yield from _missing_data(tree["evaluate"], [*tasks, *guards])
        yield from grid_faults(tree.get("methods"), tasks)

    @classmethod
    def not_there(cls, tree: Mapping[str, Any], reading: Reading) -> Iterator[Fault]:
        yield from missing_inputs(tree, reading)


def grid_faults(methods: Any, models: Iterable[str]) -> Iterator[Fault]:
    """What is wrong with the methods of a study or a suite: each of their combinations is checked."""
    for label, value in mapping(methods).items():
        try:
            made = _candidates(value)
        except ValueError:
            continue  # a fault of its own
        own: dict[str, dict[str, Any]] = {model: {} for model in models}
        texts = {fault.lines("")[0] for one in made for fault in method_faults({"method": one.stages}, own, ())}
        yield from (Fault(("methods", label), f"{label}: {text}") for text in sorted(texts))


_OF_THE_RECIPE = Recipe.model_fields.keys() - {"method", "parameters"}


def _missing_data(evaluate: Any, scored: list[str]) -> Iterator[Fault]:
    """Tasks and guards for which a built-in evaluator has no data, and the other way round."""
    kind = next(iter(evaluate)) if isinstance(evaluate, Mapping) and evaluate else ""
    data = evaluate[kind] or {} if kind in BUILT_IN and kind != TASKS else None
    if not isinstance(data, Mapping):
        return
    for name in scored:
        if name not in data:
            yield Fault(("evaluate", kind), f"evaluate.{kind} needs {name}: {{validation: FILE, test: FILE}}")
    for name in data.keys() - set(scored):
        yield Fault(("evaluate", kind, name), f"unknown task {name!r}", "unknown", did_you_mean(name, scored))


def load_study(path: str | Path) -> Study:
    """Read a study from a file, or from the file study.yaml in a folder.

    Raises RecipeError with every problem: file, line, column, what is wrong and the nearest valid word.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / FILE
    if not file.is_file():
        raise RecipeError(f"{file}: no such study; write one, or name a folder that has {FILE}: {EXAMPLE}")
    study = read_file(Study, file)
    study._file = file
    return study
