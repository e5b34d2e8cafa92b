"""What is wrong, or should be looked at: a code for programs, a place, and a line for people.

Whoever decides something asks for the code; the text is for people, and nothing depends on its wording.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = ["Code", "Problem", "Problems", "Tensors", "public", "told"]


class Code(StrEnum):
    """Every kind of problem and warning."""

    # Errors without a kind of their own are of the kind of their class.
    OTHER = "other"
    RECIPE = "recipe"  # the recipe says something that cannot be meant
    UNKNOWN = "unknown"  # a key, a model or another word of a recipe that nothing is called
    LACKING = "lacking"  # a key that must be there
    VALUE = "value"
    INPUT = "input"  # an input cannot be read, or lies about itself
    FIT = "fit"  # recipe and inputs do not go together in another way than those below
    NUMBER = "number"  # NaN, Inf, overflow
    OUTPUT = "output"  # the output cannot be written there
    EXTRA = "extra"  # an optional package is not installed

    # What a recipe names
    NO_MODELS = "no-models"
    NO_BASE = "no-base"
    UNMATCHED = "unmatched"  # a glob, role or range of blocks that no tensor meets
    STAGE = "stage"  # a stage cannot be used so
    COUNT = "count"  # of models, or of values for them
    DEPTH = "depth"  # a method that works by depth, on models without counted blocks
    CODEC = "codec"  # a codec where a merge is made, or the other way round
    STATISTIC = "statistic"

    # Tensors that do not go together
    MISSING = "missing"
    SURPLUS = "surplus"  # a tensor that the base, or first model, lacks
    TIED = "tied"
    SHAPE = "shape"
    DTYPE = "dtype"
    UNEQUAL = "unequal"  # integers, which have no mean
    OUTSIDE = "outside"  # a tensor that a method cannot merge

    # What lies beside the weights
    TOKENIZER = "tokenizer"
    VOCABULARY = "vocabulary"
    TEMPLATE = "template"
    COMPANION = "companion"
    LICENCE = "licence"

    # The machine
    MEMORY = "memory"
    DEVICE = "device"
    DISK = "disk"

    # Things to know: warnings only
    SOURCE = "source"  # how an input was read
    ADAPTER = "adapter"
    EARLIER = "earlier"  # what an earlier run on the same base noted
    DROPPED = "dropped"  # what will not be in the result
    TWIN = "twin"  # the same weights under two names
    CHANGE = "change"  # a model that has changed too much
    LENGTH = "length"  # a merged change that is much longer than an expert's
    FOUND = "found"  # what a run found out on its way
    AUTO = "auto"  # a note: what a value that was left to the program came to
    CHECK = "check"  # what a look at the finished folder says


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong (of a plan, of an error), or that the user should look at (a warning).

    where   the tensor, model, stage, file or option; '' for the run as a whole
    text    one line: what, where, which value, what to do
    """

    code: Code
    where: str
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def kind(self) -> str:
        """How a line of it begins where it stops nothing: a note says only what was asked for."""
        return "note" if self.code is Code.AUTO else "warning"

    def of(self, name: str) -> Problem:
        """The problem as one of an input, a file or a variant of that name."""
        return replace(self, where=f"{name}: {self.where}" if self.where else name, text=f"{name}: {self.text}")

    def public(self) -> Problem:
        """Without what lets others in, see `public`."""
        return replace(self, where=public(self.where), text=public(self.text))


@dataclass(frozen=True)
class Tensors:
    """Names of tensors as the subject of a sentence: 'a.weight is', '206 tensors (a.weight, b.weight, ...) are'."""

    names: Sequence[str]

    def __str__(self) -> str:
        if len(self.names) == 1:
            return self.names[0]
        more = ", ..." if len(self.names) > 2 else ""
        return f"{len(self.names)} tensors ({', '.join(self.names[:2])}{more})"

    def __getitem__(self, words: str) -> str:
        """One of two words, 'is|are', as the number asks for."""
        one, _, several = words.partition("|")
        return one if len(self.names) == 1 else several


class Problems:
    """Collects problems in the order in which they are found: each once, and those that tensors share as one."""

    def __init__(self) -> None:
        self._found: dict[object, Problem | tuple[Code, Callable[[Tensors], str], list[str]]] = {}

    def add(self, *problems: Problem) -> None:
        for problem in problems:
            self._found.setdefault(problem, problem)

    def say(self, code: Code, where: str, text: str) -> None:
        self.add(Problem(code, where, text))

    def share(self, code: Code, tensor: str, kind: object, text: Callable[[Tensors], str]) -> None:
        """A problem that a tensor has in common with all others of the same code and kind; `text` of the first."""
        shared = self._found.setdefault((code, kind), (code, text, []))
        assert isinstance(shared, tuple)
        if tensor not in shared[2][-1:]:
            shared[2].append(tensor)

    def __iter__(self) -> Iterator[Problem]:
        for found in self._found.values():
            if isinstance(found, Problem):
                yield found
            else:
                code, text, names = found
                yield Problem(code, names[0], text(Tensors(names)))

    def __bool__(self) -> bool:
        return bool(self._found)


_SECRETS = (
    (re.compile(r"hf_\w{6,}"), "hf_***"),  # access tokens
    (re.compile(r"(?i)\bbearer\s+\S+"), "Bearer ***"),
    (re.compile(r"(\w:/{1,2})[^/\s@'\"]+@"), r"\1***@"),  # names and passwords in addresses
    (re.compile(r"(\w://?[^\s?'\"]+)\?[^\s'\")]+"), r"\1?***"),  # signatures of links that are good for an hour
)


def public(text: str) -> str:
    """A text without what lets others in: tokens, and the user, password and query of every address in it."""
    for secret, shown in _SECRETS:
        text = secret.sub(shown, text)
    return text


def told(code: Code, texts: Iterable[Problem | str], where: str = "") -> Iterator[Problem]:
    """Problems of one kind and place; those that are problems already stay as they are."""
    for text in texts:
        yield Problem(code, where, text) if isinstance(text, str) else text
