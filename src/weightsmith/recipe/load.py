"""Recipes from files: YAML or JSON in, a frozen `Recipe` out, or every problem at once with its line.

Paths.  A model, statistics folder or tokenizer that exists relative to the recipe's own folder is
meant by it and made absolute; otherwise the text is left as it is (a path from the working
directory, or a hub id).  A model ending in .yaml, .yml or .json is a recipe of its own.
mergekit's configs are read as well (see `weightsmith.recipe.mergekit`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.io.read.folder import INDEX
from weightsmith.recipe.check import Problem, check_methods, spell
from weightsmith.recipe.files import SUFFIXES, exists, expanded, text_of
from weightsmith.recipe.mergekit import is_mergekit, translate
from weightsmith.recipe.override import override
from weightsmith.recipe.reader import Document, Place, read_all
from weightsmith.recipe.schema import (
    ModelRef,
    Module,
    Modules,
    Output,
    Recipe,
    Rule,
    Slices,
    Tokenizer,
    is_composed,
)

__all__ = ["apply_overrides", "from_document", "load", "loads"]

_MAX_NESTED = 200
_TOP_LINES = 50  # problems shown at most


def load(path: str | Path, overrides: Sequence[str] = (), files: list[Path] | None = None) -> Recipe:
    """Read a recipe file.  `overrides` are texts like 'parameters.density=0.3', applied before it is checked.

    `files` takes the paths of all files that were read: this one, and those of nested recipes.
    Raises RecipeError with all problems, one line each: file, line, what is wrong, the nearest valid word.
    """
    return _Loader(files).file(expanded(path), overrides)


def loads(text: str, where: str = "recipe", overrides: Sequence[str] = (), folder: str | Path | None = None) -> Recipe:
    """Read a recipe from text; `where` is what messages call it, `folder` what its paths are relative to."""
    return _Loader().text(text, where, None if folder is None else Path(folder), overrides)


def from_document(document: Document, folder: Path | None) -> Recipe:
    """The recipe in a text that was parsed already, with the lines that messages name."""
    return _Loader().recipe(document, folder)


def apply_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with other values: 'parameters.density=0.3', 'models.math.weight=2', 'rules.0.match=*'.

    The value is read as YAML.  Keys that hold dots (model names) are found whole.  The result is checked again.
    """
    from weightsmith.recipe.text import dumps

    return loads(dumps(recipe), "recipe", overrides)


class _Loader:
    """One call of `load`: the files that are open (to find loops), all that were read, and how many recipes."""

    def __init__(self, files: list[Path] | None = None) -> None:
        self.open: list[Path] = []
        self.files = [] if files is None else files
        self.count = 0

    def file(self, path: Path, overrides: Sequence[str] = ()) -> Recipe:
        text = text_of(path)
        real = path.resolve()
        if real in self.open:
            chain = " -> ".join(p.name for p in [*self.open[self.open.index(real) :], real])
            raise RecipeError(f"{path}: the recipe is made of itself: {chain}")
        self.open.append(real)
        self.files.append(real)
        try:
            return self.text(text, str(path), path.absolute().parent, overrides)
        finally:
            self.open.pop()

    def text(self, text: str, where: str, folder: Path | None, overrides: Sequence[str]) -> Recipe:
        documents = read_all(text, where)
        for assignment in overrides:
            override(documents[-1], assignment)
        if len(documents) > 1 or is_mergekit(documents[0].tree):
            return self.recipe(translate(documents), folder)
        return self.recipe(documents[0], folder)

    def recipe(self, document: Document, folder: Path | None) -> Recipe:
        self.count += 1
        if self.count > _MAX_NESTED:
            raise RecipeError(f"{document.where}: more than {_MAX_NESTED} nested recipes")
        tree = document.tree
        if not isinstance(tree, dict):
            raise RecipeError(f"{document.at(())}: a recipe is a mapping with models and method, not {_kind(tree)}")
        if "experts" in tree and "models" not in tree:
            raise RecipeError(
                f'{document.at(("experts",))}: this recipe builds a mixture of experts; run it with "weightsmith moe"'
            )
        return _Form(self, document, folder).build()


class _Form:
    """Fills one `Recipe` from one document and collects what is wrong."""

    def __init__(self, loader: _Loader, document: Document, folder: Path | None) -> None:
        self.loader, self.document, self.folder = loader, document, folder
        self.problems: list[Problem] = []
        self.inner: list[str] = []  # problems of nested recipes, with their own places

    def build(self) -> Recipe:
        # A key without a value says nothing; for models that is a mistake of its own.
        tree = {k: v for k, v in self.document.tree.items() if v is not None or k == "models"}
        self.problems += check_methods(tree)
        self.references(tree)
        self.tokenizer(tree)
        recipe = self.validated(tree)
        if recipe is None:
            raise RecipeError(self.report())
        return recipe

    def say(self, place: Place, text: str) -> None:
        self.problems.append(Problem(place, text))

    def report(self) -> str:
        lines = [f"{self.document.at(p.place)}: {p.text}" for p in self.problems]
        lines = sorted(dict.fromkeys(lines), key=_line_number) + self.inner
        if len(lines) == 1:
            return lines[0]
        shown = [f"  - {line}" for line in lines[:_TOP_LINES]]
        if len(lines) > _TOP_LINES:
            shown.append(f"  - and {len(lines) - _TOP_LINES} more")
        return "\n".join([f"{len(lines)} problems:", *shown])

    # -- models

    def references(self, tree: dict[str, Any]) -> None:
        """Bring base and models to their long form, with paths and nested recipes resolved."""
        seen: dict[str, Place] = {}
        if tree.get("base") is not None:
            tree["base"] = self.reference(tree["base"], ("base",))
            for key in tree["base"].keys() - ModelRef.model_fields.keys():
                text = f"unknown key {key!r} in base{did_you_mean(key, ModelRef.model_fields)}"
                self.say(("base", key), f"{text}; parameters are for the models")
            self.twice(tree["base"], ("base",), seen)
        if "models" not in tree:
            return  # reported with the other missing keys
        models = tree["models"]
        if models is None or models == {} or models == []:
            self.say(("models",), "zero experts: name at least one model under 'models', as math: path/to/math")
            tree["models"] = {}
        elif not isinstance(models, dict):
            self.say(
                ("models",),
                f"models should be a mapping from names to models, as math: path/to/math; is {_kind(models)}",
            )
            tree["models"] = {}
        else:
            tree["models"] = {n: self.reference(r, ("models", n)) for n, r in models.items()}
        for name, ref in tree["models"].items():
            self.name(name)
            self.twice(ref, ("models", name), seen)

    def reference(self, value: Any, place: Place) -> dict[str, Any]:
        inside = place
        if isinstance(value, str) or is_composed(value):
            ref: dict[str, Any] = {"model": value}
        elif isinstance(value, dict):
            ref, inside = dict(value), (*place, "model")
        else:
            ref = {"model": value}
        model = ref.get("model")
        if "model" not in ref:
            self.say(place, f"{spell(place)} has no 'model'; write model: PATH")
        elif isinstance(model, dict):
            ref["model"] = self.composed(model, inside)
        elif not isinstance(model, str) or not model.strip():
            self.say(inside, f"{spell(inside)} should be a path, a hub id or a recipe; is {_kind(model)}")
        elif Path(model).suffix.lower() in SUFFIXES and not model.endswith(INDEX):
            ref["model"] = self.nested_file(model, inside)
        else:
            ref["model"] = self.located(model)
        if not isinstance(ref.get("model"), (str, Recipe, Slices, Modules)):
            ref["model"] = "?"  # already reported
        if isinstance(ref.get("adapter"), str):
            ref["adapter"] = self.located(ref["adapter"])
        stats = ref.get("stats")
        if isinstance(stats, (str, list)):
            ref["stats"] = [
                self.located(s) if isinstance(s, str) else s for s in ([stats] if isinstance(stats, str) else stats)
            ]
        return ref

    def composed(self, tree: dict[str, Any], place: Place) -> Recipe | Slices | Modules | None:
        """A model made of models: a recipe, slices on top of each other, or modules side by side."""
        word = next((w for w in ("slices", "modules") if w in tree and "models" not in tree), None)
        if word is None:
            return self.nested_text(tree, place)
        parts, here = tree[word], (*place, word)
        for key in tree.keys() - {word}:
            self.say((*place, key), f"unknown key {key!r} beside {word!r} in {spell(place)}; it takes no other")
        if word == "slices":
            if not isinstance(parts, list) or not parts:
                self.say(here, f"{spell(here)} should be a list of models, each with a dash; is {_kind(parts)}")
                return None
            found = [self.part(part, (*here, i)) for i, part in enumerate(parts)]
            slices: Slices | None = self.checked(Slices, {"slices": found}, here)
            return slices
        if not isinstance(parts, dict) or not parts:
            self.say(here, f"{spell(here)} should be a mapping from names to modules; is {_kind(parts)}")
            return None
        named = {name: self.module(module, (*here, name)) for name, module in parts.items()}
        modules: Modules | None = self.checked(Modules, {"modules": named}, here)
        return modules

    def part(self, value: Any, place: Place) -> dict[str, Any]:
        """A slice or a module's model: it has no parameters of its own."""
        ref = self.reference(value, place)
        for key in ref.keys() - ModelRef.model_fields.keys():
            text = f"unknown key {key!r} in {spell(place)}{did_you_mean(str(key), ModelRef.model_fields)}"
            self.say((*place, key), f"{text}; parameters belong to the models of a recipe")
        return ref

    def module(self, value: Any, place: Place) -> Any:
        if not isinstance(value, dict) or "model" not in value:
            self.say(place, f"{spell(place)} should be a mapping with match and model; is {_kind(value)}")
            return {"model": "?"}
        for key in value.keys() - Module.model_fields.keys():
            self.say(
                (*place, key), f"unknown key {key!r} in {spell(place)}{did_you_mean(str(key), Module.model_fields)}"
            )
        return {k: v for k, v in value.items() if k == "match"} | {
            "model": self.part(value["model"], (*place, "model"))
        }

    def checked(self, kind: type[Any], tree: dict[str, Any], place: Place) -> Any:
        """The value, unless something in it has been found wrong already or is now."""
        if any(p.place[: len(place)] == place for p in self.problems) or self.inner:
            return None
        try:
            return kind.model_validate(tree)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                inner = tuple(step for step in detail["loc"][1:] if step != "function-before[_words()]")
                said = str(detail["msg"]).removeprefix("Value error, ").replace("Input should be", "should be")
                self.say((*place, *inner), f"{spell((*place, *inner))}: {said}")
            return None

    def nested_file(self, text: str, place: Place) -> Recipe | None:
        try:
            return self.loader.file(expanded(self.located(text)))
        except RecipeError as error:
            self.inner += _lines_of(error, f"{self.document.at(place)}: in {spell(place)}")
            return None

    def nested_text(self, tree: dict[str, Any], place: Place) -> Recipe | None:
        lines = {p[len(place) :]: line for p, line in self.document.lines.items() if p[: len(place)] == place}
        try:
            return self.loader.recipe(Document(self.document.where, tree, lines), self.folder)
        except RecipeError as error:
            self.inner += _lines_of(error, "")
            return None

    def located(self, text: str) -> str:
        """The absolute path where one exists beside the recipe; else the text as written."""
        path = expanded(text)
        if self.folder is not None and not path.is_absolute() and exists(self.folder / path):
            return str((self.folder / path).absolute())
        return str(path) if text.startswith("~") else text

    def name(self, name: str) -> None:
        if name in ("", "base"):
            self.say(("models", name), f"a model cannot be called {name!r}; give it another name")

    def twice(self, ref: Mapping[str, Any], place: Place, seen: dict[str, Place]) -> None:
        """One model under two names weighs double without anybody having said so."""
        model = ref["model"]
        if model == "?":
            return
        identity = str(Path(model).resolve()) if isinstance(model, str) and exists(Path(model)) else repr(model)
        identity += repr([ref.get(part) for part in ("adapter", "layers", "stack", "expert")])
        first = seen.setdefault(identity, place)
        if first != place:
            shown = model if isinstance(model, str) else "the same recipe"
            hint = "leave one out, or give it a weight" if first != ("base",) else "it has no task vector; leave it out"
            self.say(place, f"{spell(place)} is the same model as {spell(first)} ({shown}); {hint}")

    def tokenizer(self, tree: dict[str, Any]) -> None:
        wanted = tree.get("tokenizer")
        block: dict[str, Any] = wanted if isinstance(wanted, dict) else {"source": wanted}
        source, place = block.get("source"), ("tokenizer", "source") if block is wanted else ("tokenizer",)
        for key in block.keys() - Tokenizer.model_fields.keys():
            known = did_you_mean(str(key), Tokenizer.model_fields)
            self.say(("tokenizer", key), f"unknown key {key!r} in tokenizer{known}")
        names = [*(["base"] if tree.get("base") is not None else []), *tree.get("models", ())]
        if not isinstance(source, str) or source in (*names, "union"):
            return
        found = self.located(source)
        tree["tokenizer"] = {**block, "source": found}
        if not exists(Path(found)):
            text = f"tokenizer {source!r} is neither a model of this recipe nor a folder"
            self.say(place, text + did_you_mean(source, names))

    # -- the rest: keys and types

    def validated(self, tree: dict[str, Any]) -> Recipe | None:
        """The recipe, if nothing at all is wrong.  Methods and parameters have been checked before."""
        bad = {p.place[:2] if p.place[:1] == ("rules",) else p.place[:1] for p in self.problems}
        trial = dict(tree)
        if ("method",) in bad:
            trial["method"] = "keep"
        if ("parameters",) in bad:
            trial["parameters"] = {}
        if isinstance(tree.get("rules"), list):
            trial["rules"] = [self.rule(r, i) for i, r in enumerate(tree["rules"])]
        try:
            recipe = Recipe.model_validate(trial)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self.refused(detail, trial)
            return None
        return None if self.problems or self.inner else recipe

    def rule(self, rule: Any, index: int) -> Any:
        """The rule without what has been found wrong with it already."""
        if not isinstance(rule, dict):
            return rule
        wrong = {p.place[2] for p in self.problems if p.place[:2] == ("rules", index) and len(p.place) > 2}
        return {k: v for k, v in rule.items() if k not in wrong}

    def refused(self, detail: Any, tree: Mapping[str, Any]) -> None:
        """Say in the recipe's words what pydantic found."""
        place: Place = tuple(detail["loc"])
        parent, key = place[:-1], place[-1] if place else ""
        kind = detail["type"]
        if kind == "extra_forbidden":
            self.say(place, f"unknown key {key!r} in {spell(parent)}{did_you_mean(str(key), _fields(parent))}")
        elif kind == "missing":
            nearest = difflib.get_close_matches(str(key), map(str, tree), n=1)
            example = {"method": "method: ties", "models": "models: {math: path/to/math}"}.get(str(key), f"{key}: ...")
            if not (parent == () and nearest and nearest[0] not in Recipe.model_fields):  # the misspelt key is reported
                self.say(parent, f"{spell(parent)} has no {key!r}; write {example}")
        else:
            place = self.written(place, tree)
            said = str(detail["msg"]).removeprefix("Value error, ")
            said = said.replace("Input should be", "should be").replace("a valid dictionary", "a mapping")
            shown = "" if kind == "value_error" else f", is {json.dumps(detail.get('input'), default=repr)[:80]}"
            self.say(place, f"{spell(place)}: {said}{shown}")

    def written(self, place: Place, tree: Any) -> Place:
        """The part of pydantic's path that is in the recipe (it names the arms of unions too)."""
        for i, step in enumerate(place):
            try:
                tree = tree[step]
            except (KeyError, IndexError, TypeError):
                return place[:i]
        return place


def _fields(place: Place) -> Sequence[str]:
    """The keys known at a place."""
    match place:
        case ():
            return list(Recipe.model_fields)
        case ("output",):
            return list(Output.model_fields)
        case ("rules", int()):
            return list(Rule.model_fields)
    return []


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a word", type(None): "nothing"}
    if isinstance(value, str) and not value.strip():
        return "an empty text"
    return names.get(type(value)) or repr(value)


def _line_number(line: str) -> tuple[bool, int]:
    """By line; problems from the command line's overrides last."""
    for word in line.split(":")[1:3]:
        if word.isdigit():
            return False, int(word)
    return True, 0


def _lines_of(error: RecipeError, before: str) -> list[str]:
    lines = str(error).splitlines()
    if len(lines) > 1:
        lines = [line.removeprefix("  - ") for line in lines[1:]]
    return [f"{before}: {line}" if before else line for line in lines]
