"""The base of all models that files are read into: their short forms, and what is wrong with them in plain words.

pydantic finds wrong types and keys, `Grammar.faults` what lies between the fields.  Both become faults whose locations
are those of the file, whatever short form it uses, and all faults of a file are told together (`build`):

    recipe.yaml:7:3: unknown key 'wieght' in parameters; did you mean 'weight'?
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.problem import Code, Problem
from weightsmith.recipe.files import exists, expanded
from weightsmith.recipe.override import override
from weightsmith.recipe.reader import Document, Location, plain_scalar, spell

__all__ = ["PYTHON", "Fault", "Grammar", "Reading", "build", "inside", "kind_of", "listing", "mapping", "unknown"]

G = TypeVar("G", bound="Grammar")


class Fault(NamedTuple):
    """What is wrong, and where in the file.

    form   how the location stands beside the text: 'said' not at all, 'value' before it, 'lacking' the mapping before
           it, 'unknown' the mapping behind it, 'nested' before each line, which is of another file
    hint   the end of the text
    """

    location: Location
    text: str
    form: str = "said"
    hint: str = ""

    def lines(self, root: str) -> list[str]:
        """What is wrong in words, mostly one line; `root` is what the whole file is called."""
        here, mapping = spell(self.location, root), spell(self.location[:-1], root)
        if self.form == "nested":
            return [f"in {here}: {line}" for line in self.text.split("\n")]
        if self.form == "unknown":
            return [f"{self.text} in {mapping}{self.hint}"]
        if self.form == "lacking":
            return [f"{mapping} {self.text}{self.hint}"]
        if self.form == "value":
            joint = " " if self.text.startswith(("should ", "is ", "takes ", "has ")) else ": "
            return [f"{here}{joint}{self.text}{self.hint}"]
        return [f"{self.text}{self.hint}"]

    def problems(self, root: str) -> list[Problem]:
        """The lines as problems at their location."""
        code = _CODES.get(self.form, Code.RECIPE)
        return [Problem(code, spell(self.location, root), line) for line in self.lines(root)]

    def raised(self) -> Any:
        """The fault as a line of a ValidationError."""
        error = PydanticCustomError(self.form, "{text}{hint}", {"text": self.text, "hint": self.hint})
        return {"type": error, "loc": self.location, "input": None}

    def error(self) -> ValidationError:
        """The fault by itself, for a validator to raise."""
        return ValidationError.from_exception_data("fault", [self.raised()])

    @classmethod
    def caught(cls, detail: Any, model: type[Grammar], reading: Reading) -> Fault:
        """What one line of a ValidationError says, in words; `model` lacks, or does not know, the key."""
        kind, location, given, context = detail["type"], detail["loc"], detail["input"], detail.get("ctx", {})
        if kind in ("said", "value", "lacking", "unknown", "stage", "nested"):
            return cls(location, context["text"], kind, context["hint"])
        if kind == "extra_forbidden":
            key = str(location[-1])
            return cls(location, f"unknown key {key!r}", "unknown", model.hint(key, reading))
        if kind == "missing":
            key = str(location[-1])
            example = (model.model_fields[key].examples or ["..."])[0]
            return cls(location, f"has no {key!r}; write {key}: {example}", "lacking")
        if kind == "value_error":
            return cls(location, str(context["error"]), "value")
        if kind in ("dict_type", "model_type"):
            return cls(location, f"should be a mapping, is {kind_of(given)}", "value")
        wanted = _WANTED.get(kind) or str(detail["msg"]).removeprefix("Input ")
        return cls(
            location, f"{wanted}, is {json.dumps(given, default=repr)[:80]}", "value", _hint(kind, given, context)
        )


_CODES = {"value": Code.VALUE, "lacking": Code.LACKING, "unknown": Code.UNKNOWN, "stage": Code.UNKNOWN}

_WANTED = {
    "string_type": "should be a text",
    "int_type": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
}


def _hint(kind: str, given: Any, context: Mapping[str, Any]) -> str:
    """What to write instead of a word."""
    if not isinstance(given, str):
        return ""
    if kind == "literal_error":
        near = difflib.get_close_matches(given, re.findall(r"'([^']*)'", context["expected"]), n=1)
        return f"; did you mean {near[0]!r}?" if near else ""
    number = kind in ("int_type", "float_type") and type(plain_scalar(given)) in (int, float)
    return f"; write {given} without quotes" if number else ""


def inside(key: str, faults: Iterable[Fault]) -> list[Fault]:
    """The faults of a part of a file, which stands under a key."""
    return [fault._replace(location=(key, *fault.location)) for fault in faults]


def unknown(location: Location, known: Iterable[str], more: str = "") -> Fault:
    """An unknown key, with the nearest known one."""
    key = str(location[-1])
    return Fault(location, f"unknown key {key!r}", "unknown", did_you_mean(key, known) + more)


def mapping(value: Any) -> Mapping[Any, Any]:
    """The value if it is a mapping, else an empty one: that it is none is a fault of its own."""
    return value if isinstance(value, Mapping) else {}


def listing(value: Any) -> Sequence[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, (list, tuple)) else ()


def kind_of(value: Any) -> str:
    """What kind of value stands where another should, in words."""
    if isinstance(value, str) and not value.strip():
        return "an empty text"
    return {dict: "a mapping", list: "a list", str: "a word", type(None): "nothing"}.get(type(value)) or repr(value)


@dataclass
class Reading:
    """The reading of one file, as the validators see it (their context): where its paths begin, and what is inside it.

    nested   path -> the recipe in that file
    count    called for every recipe in this file; raises RecipeError if there are too many
    python   there is no file: paths stay as they are, and models may be names of what is in memory
    """

    folder: Path | None = None
    nested: Callable[[str], Any] | None = None
    count: Callable[[], None] = lambda: None
    python: bool = False

    def located(self, text: str) -> str:
        """The absolute path where one exists beside the file; else the text as written."""
        if self.python:
            return text
        path = expanded(text)
        if self.folder is not None and not path.is_absolute() and exists(self.folder / path):
            return str((self.folder / path).absolute())
        return str(path) if text.startswith("~") else text


PYTHON = Reading(python=True)


class Grammar(BaseModel):
    """A frozen model of a file or of a part of it.  From Python, a faulty file (`ROOT`) is a RecipeError as well."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    ROOT: ClassVar[str] = ""
    """What the whole is called in messages, of a model that stands for a file."""
    SHORT: ClassVar[str] = ""
    """The field that a value which is no mapping stands for."""

    @classmethod
    def document(cls, documents: Sequence[Document], overrides: Sequence[str] = ()) -> Document:
        """The one document of a file, with overrides, in the words of this model; other dialects are translated."""
        for text in overrides:
            override(documents[-1], text)
        if len(documents) > 1:
            raise RecipeError(f"{documents[1].at(())}: a second document begins here; {cls.ROOT} is one")
        return documents[0]

    @classmethod
    def long_form(cls, given: Any, reading: Reading) -> tuple[Any, Mapping[str, Location]]:
        """What is meant by a short form, and where in it the fields are that it does not name.

        Raises ValueError for what cannot be one.
        """
        if cls.SHORT and not isinstance(given, Mapping):
            return {cls.SHORT: given}, {cls.SHORT: ()}
        return given, {}

    @classmethod
    def faults(cls, tree: Mapping[str, Any], reading: Reading) -> Iterable[Fault]:
        """What is wrong between the fields.  Values are as written, or models already; any may be wrong itself."""
        return ()

    @classmethod
    def not_there(cls, tree: Mapping[str, Any], reading: Reading) -> Iterable[Fault]:
        """Inputs that do not exist: said with other faults only, else opening them says more."""
        return ()

    @classmethod
    def hint(cls, key: str, reading: Reading) -> str:
        """What to say of an unknown key."""
        return did_you_mean(key, cls.model_fields)

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, given: Any, validate: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if isinstance(given, cls):
            return validate(given)
        reading: Reading = info.context or PYTHON
        faults: list[Fault] = []
        try:
            tree, moved = cls.long_form(given, reading)
        except ValueError as error:
            faults.append(Fault((), str(error), "value"))
        else:
            if isinstance(tree, Mapping):  # an optional key without a value says nothing
                optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
                tree = {k: v for k, v in tree.items() if v is not None or k not in optional}
                faults += cls.faults(tree, reading)
            try:
                made = validate(tree)
            except ValidationError as error:
                found = [Fault.caught(detail, cls, reading) for detail in _one_each(error.errors(include_url=False))]
                faults += [_moved(fault, moved) for fault in _without_misspelt(found)]
        if not faults:
            return made
        if info.context is None and cls.ROOT:
            raise RecipeError(*dict.fromkeys(one for fault in faults for one in fault.problems(cls.ROOT)))
        raise ValidationError.from_exception_data(cls.__name__, [fault.raised() for fault in faults])


def _one_each(details: Iterable[Any]) -> Iterator[Any]:
    """The lines of a ValidationError; where a value may be of several kinds pydantic has one for each: the nearest."""
    for detail in details:
        place = tuple(step for step in detail["loc"] if not str(step).startswith("dict["))
        mapped, plain = len(place) < len(detail["loc"]), detail["type"] == f"{place[-1:] and place[-1]}_type"
        if plain and isinstance(detail["input"], Mapping):
            continue
        if mapped and detail["loc"][-1] != place[-1]:
            continue  # what it says of the other kind is enough
        yield detail if not mapped and not plain else {**detail, "loc": place[:-1] if plain else place}


def _moved(fault: Fault, moved: Mapping[str, Location]) -> Fault:
    """The fault at its location in the short form."""
    if not fault.location or fault.location[0] not in moved:
        return fault
    return fault._replace(location=(*moved[str(fault.location[0])], *fault.location[1:]))


def _without_misspelt(faults: Sequence[Fault]) -> list[Fault]:
    """Without the missing keys that stand there misspelt, as unknown ones."""
    keys = [str(f.location[-1]) for f in faults if f.form == "unknown" and len(f.location) == 1]
    return [
        f for f in faults
        if f.form != "lacking" or len(f.location) > 1 or not difflib.get_close_matches(str(f.location[0]), keys)
    ]  # fmt: skip


def build(kind: type[G], document: Document, reading: Reading) -> G:
    """The model that a document says; RecipeError with every fault and its position, in the order of the file."""
    try:
        return kind.model_validate(document.tree, context=reading)
    except ValidationError as error:
        faults = [Fault.caught(detail, kind, reading) for detail in error.errors(include_url=False)]
    faults += kind.not_there(mapping(document.tree), reading)
    placed = [(document.at(fault.location), one) for fault in faults for one in fault.problems(kind.ROOT)]
    placed.sort(key=lambda one: (not one[0].line, one[0].line, one[0].column))  # the command line's last
    raise RecipeError(
        *dict.fromkeys(Problem(one.code, str(place), f"{place}: {one.text}") for place, one in placed)
    ) from None
