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

`base`, `models`, `exclude`, `rules`, `tokenizer`, `output`, `seed`, `extra` and `nonfinite` are as in a recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.io.read.files import File
from weightsmith.recipe.check import check_methods
from weightsmith.recipe.load import from_document
from weightsmith.recipe.reader import MAX_BYTES, Document, Place, read
from weightsmith.recipe.schema import Recipe
from weightsmith.study.grids import Candidate, candidates

__all__ = ["BUILT_IN", "FUNCTION", "Evaluation", "Study", "load_study"]

FILE = "study.yaml"
FUNCTION = "function"
BUILT_IN = {"bits_per_byte": ("bits per byte", False), "accuracy": ("accuracy, %", True)}
"""Evaluators that need no code: name -> (what the score is called, whether higher is better)."""

_OF_THE_RECIPE = ("base", "models", "exclude", "rules", "tokenizer", "output", "seed", "extra", "nonfinite")
_OWN = ("title", "about", "joint", "guards", "score", "higher_is_better", "evaluate", "methods")
_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Evaluation:
    """How models are scored.

    kind       FUNCTION (of the user's file) or one of BUILT_IN
    arguments  of the function; for a built-in evaluator task -> split -> absolute path of the data
    """

    kind: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """One base with one expert per task.  Studies of the same title are repetitions (other seeds) of one another.

    recipe   all of a merge but its method
    methods  label -> candidates, or None: all methods that apply
    """

    file: Path
    title: str
    about: str
    recipe: Recipe
    joint: str | None
    guards: tuple[str, ...]
    score: str
    higher_is_better: bool
    evaluation: Evaluation
    methods: Mapping[str, tuple[Candidate, ...]] | None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.recipe.models)

    @property
    def scored(self) -> tuple[str, ...]:
        """What every evaluation must give a score for."""
        return (*self.tasks, *self.guards)


def load_study(path: str | Path) -> Study:
    """Read a study from a file, or from the file study.yaml in a folder.

    Raises RecipeError with file, line, what is wrong and the nearest valid word.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / FILE
    if not file.is_file():
        raise RecipeError(f"{file}: no such study; write one (base, models, evaluate) or name a folder that has {FILE}")
    source = File(file)
    if source.size > MAX_BYTES:
        raise RecipeError(f"{file}: {source.size:,} bytes; a study has at most {MAX_BYTES:,}")
    try:
        text = source.read(0, source.size).tobytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: byte {error.start} is not UTF-8 text; is this a study?") from None
    return _Form(read(text, str(file)), file).build()


class _Form:
    """Fills one Study from one document."""

    def __init__(self, document: Document, file: Path) -> None:
        self.document, self.file, self.folder = document, file, file.absolute().parent
        if not isinstance(document.tree, dict):
            raise RecipeError(f"{document.at(())}: a study is a mapping with base, models and evaluate")
        self.tree: dict[str, Any] = {k: v for k, v in document.tree.items() if v is not None}

    def refuse(self, place: Place, text: str) -> RecipeError:
        return RecipeError(f"{self.document.at(place)}: {text}")

    def build(self) -> Study:
        known = (*_OF_THE_RECIPE, *_OWN)
        for key in self.tree:
            if key not in known:
                hint = "; it is named on the command line: --evaluator FILE" if key == "evaluator" else None
                raise self.refuse((key,), f"unknown key {key!r} in the study{hint or did_you_mean(key, known)}")
        if "base" not in self.tree:
            raise self.refuse((), "a study needs a base: what the experts gained is measured against it")
        recipe = self.recipe()
        guards = self.words("guards")
        if both := [guard for guard in guards if guard in recipe.models]:
            raise self.refuse(
                ("guards",), f"{both[0]!r} is a task and a guard; a guard is what no expert was trained for"
            )
        evaluation = self.evaluation((*recipe.models, *guards))
        score, higher = BUILT_IN.get(evaluation.kind, ("score", True))
        return Study(
            file=self.file,
            title=self.word("title", self.folder.name),
            about=" ".join(self.word("about", "").split()),
            recipe=recipe,
            joint=self.joint(),
            guards=guards,
            score=self.word("score", score),
            higher_is_better=self.flag("higher_is_better", higher),
            evaluation=evaluation,
            methods=self.methods(),
        )

    # -- plain values

    def word(self, key: str, default: str) -> str:
        value = self.tree.get(key, default)
        if not isinstance(value, str) or (key in self.tree and not value.strip()):
            raise self.refuse((key,), f"{key} should be a text, is {json.dumps(value)[:80]}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.tree.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse((key,), f"{key} should be true or false, is {json.dumps(value)[:80]}")
        return value

    def words(self, key: str) -> tuple[str, ...]:
        value = self.tree.get(key, [])
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(w, str) for w in found) or len(set(found)) < len(found):
            raise self.refuse((key,), f"{key} should be a list of different words, is {json.dumps(value)[:80]}")
        return tuple(found)

    def joint(self) -> str | None:
        if "joint" not in self.tree:
            return None
        given = self.word("joint", "")
        path = self.folder / Path(given).expanduser()
        if not path.exists():
            raise self.refuse(("joint",), f"joint {given!r}: no such file or folder beside the study")
        return str(path)

    # -- what is merged

    def recipe(self) -> Recipe:
        kept = {k: self.document.tree[k] for k in _OF_THE_RECIPE if k in self.tree}
        lines = {place: line for place, line in self.document.lines.items() if not place or place[0] in kept}
        return from_document(Document(self.document.where, {**kept, "method": "linear"}, lines), self.folder)

    def methods(self) -> dict[str, tuple[Candidate, ...]] | None:
        written = self.tree.get("methods")
        if written is None:
            return None
        if not isinstance(written, dict) or not written:
            raise self.refuse(("methods",), "methods should be a mapping, as TIES: {ties: {lambda: [0.5, 1]}}")
        return {label: self.method(label, value) for label, value in written.items()}

    def method(self, label: str, value: Any) -> tuple[Candidate, ...]:
        """The candidates of one entry, each checked as a recipe's method is."""
        place = ("methods", label)
        stages = value if isinstance(value, list) else [value]
        grid: list[tuple[str, dict[str, Any]]] = []
        for stage in stages:
            if isinstance(stage, str):
                grid.append((stage, {}))
            elif isinstance(stage, dict) and len(stage) == 1 and isinstance(next(iter(stage.values())), dict | None):
                ((name, parameters),) = stage.items()
                grid.append((name, parameters or {}))
            else:
                raise self.refuse(
                    place, f"{label}: a stage is a name, or a name with its parameters; is {json.dumps(stage)[:80]}"
                )
        if empty := [f"{name}.{key}" for name, found in grid for key, values in found.items() if values == []]:
            raise self.refuse(place, f"{label}: {empty[0]} is an empty list; give the values to try")
        made = candidates(tuple(grid))
        for candidate in made:
            method = [{stage.name: stage.parameters} for stage in candidate.stages]
            problems = check_methods({"method": method, "models": self.tree.get("models", {})})
            if problems:
                raise self.refuse(place, f"{label}: {problems[0].text}")
        return made

    # -- how it is scored

    def evaluation(self, scored: tuple[str, ...]) -> Evaluation:
        written = self.tree.get("evaluate", {FUNCTION: {}})
        kinds = (FUNCTION, *BUILT_IN)
        if written == FUNCTION:
            written = {FUNCTION: {}}
        if not isinstance(written, dict) or len(written) != 1 or next(iter(written)) not in kinds:
            raise self.refuse(("evaluate",), f"evaluate takes one of {', '.join(kinds)}, is {json.dumps(written)[:80]}")
        ((kind, arguments),) = written.items()
        place = ("evaluate", kind)
        if not isinstance(arguments or {}, dict):
            raise self.refuse(place, f"evaluate.{kind} should be a mapping, is {json.dumps(arguments)[:80]}")
        if kind == FUNCTION:
            return Evaluation(kind, arguments or {})
        return Evaluation(kind, {name: self.data(kind, name, (arguments or {}).get(name)) for name in scored})

    def data(self, kind: str, name: str, value: Any) -> dict[str, str]:
        """Split -> path of one task's data."""
        place = ("evaluate", kind, name)
        wanted = f"{{{', '.join(f'{split}: FILE' for split in _SPLITS)}}}"
        if not isinstance(value, dict) or set(value) != set(_SPLITS):
            raise self.refuse(place, f"evaluate.{kind} needs {name}: {wanted}, has {json.dumps(value)[:80]}")
        found = {}
        for split in _SPLITS:
            path = self.folder / Path(str(value[split])).expanduser()
            if not path.is_file():
                raise self.refuse((*place, split), f"{split} data of {name}: no file {value[split]}")
            found[split] = str(path)
        if Path(found["validation"]).samefile(found["test"]):
            raise self.refuse(
                place, f"{name}: validation and test are the same file; coefficients are never chosen on test data"
            )
        return found
