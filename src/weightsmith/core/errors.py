"""Every error that weightsmith raises on purpose.

    WeightsmithError          exit code 2, one line, no traceback
    ├── RecipeError           the recipe says something that cannot be meant; carries all problems at once
    ├── SourceError           an input cannot be read, or lies about itself; NoBaseError: without its base
    ├── PlanError             recipe and inputs do not go together; carries all problems at once
    ├── NumericError          NaN, Inf or overflow, with tensor, model and place
    ├── OutputError           the output folder cannot be written, resumed or verified
    │   └── NotKept           what was made is not worth keeping; nothing of it is left
    └── MissingExtra          an optional package is needed; the text holds the pip command

A text says what, where, which value, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import ClassVar

from weightsmith.core.problem import Code, Problem, public, told

__all__ = [
    "Faults",
    "MissingExtra",
    "NoBaseError",
    "NotKept",
    "NumericError",
    "OutputError",
    "PlanError",
    "RecipeError",
    "SourceError",
    "WeightsmithError",
    "closest",
    "did_you_mean",
    "nearest",
    "problems_of",
    "public",
    "some",
]


class WeightsmithError(Exception):
    """Root of the tree; the command line prints its text and exits with `code`.

    Names from files stand in the texts: what could drive a terminal or end a line in a log is spelt out (\\x1b).
    Addresses do too: their passwords and query strings are left out (`public`).
    """

    code = 2
    kind: ClassVar[Code] = Code.OTHER
    """Of problems that are given as mere texts."""
    problems: tuple[Problem, ...] = ()
    """Every one of several, where the error carries more than its text."""

    def __init__(self, text: str = "") -> None:
        shown = public(text) if ":/" in text or "hf_" in text else text
        super().__init__("".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in shown))


_MOST = 50  # problems shown of one recipe


def _listed(problems: Sequence[Problem], most: int | None = None) -> str:
    """One problem as it is, several as a list under their number."""
    if len(problems) == 1:
        return problems[0].text
    more = len(problems) - len(problems[:most])
    lines = [*(problem.text for problem in problems[:most]), *([f"and {more} more"] if more else [])]
    return "\n".join([f"{len(problems)} problems:", *(f"  - {line}" for line in lines)])


class RecipeError(WeightsmithError):
    """The recipe is wrong in itself (unknown key, value out of range, contradictory parts).

    `problems` holds every one of them; of very many the text shows the first.
    """

    kind = Code.RECIPE

    def __init__(self, *problems: Problem | str) -> None:
        self.problems = tuple(problem.public() for problem in told(self.kind, problems))
        super().__init__(_listed(self.problems, _MOST))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[Problem, ...]]:
        return RecipeError, self.problems


class SourceError(WeightsmithError):
    """An input is missing, truncated, hostile or of an unknown kind."""

    kind = Code.INPUT


class NoBaseError(SourceError):
    """An input is nothing without a base model, and none is there."""

    kind = Code.NO_BASE


class PlanError(WeightsmithError):
    """Recipe and inputs do not fit.  `problems` holds every one of them."""

    kind = Code.FIT

    def __init__(self, problems: Iterable[Problem | str]) -> None:
        self.problems = tuple(problem.public() for problem in told(self.kind, problems))
        super().__init__(_listed(self.problems))

    def __reduce__(self) -> tuple[type[PlanError], tuple[tuple[Problem, ...]]]:
        return PlanError, (self.problems,)


class NumericError(WeightsmithError):
    """A value that is not a finite number was found, or would be written."""

    kind = Code.NUMBER


class OutputError(WeightsmithError):
    """The output folder is in the way, in use, damaged, or belongs to another recipe."""

    kind = Code.OUTPUT


class NotKept(OutputError):
    """What was made turned out to be of no use: nothing of it is left, not even to resume."""


class MissingExtra(WeightsmithError):
    """An optional package is not installed.  `extra` is weightsmith's, or '' where the package goes by itself."""

    kind = Code.EXTRA

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package, self.extra, self.purpose = package, extra, purpose
        what = f"'weightsmith[{extra}]'" if extra else package
        super().__init__(f"{purpose} needs {package}; install it with: pip install {what}")

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str, str]]:
        return MissingExtra, (self.package, self.extra, self.purpose)


def problems_of(error: WeightsmithError) -> tuple[Problem, ...]:
    """What an error complains of, one by one."""
    return error.problems or (Problem(error.kind, "", str(error)),)


class Faults:
    """Steps that do not hang on each other, each under `with faults:`; `raised` tells what all of them complain of."""

    def __init__(self) -> None:
        self._caught: list[WeightsmithError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, WeightsmithError):
            return False
        self._caught.append(error)
        return True

    def raised(self) -> None:
        """Raise the one error, or PlanError with the problems of several; nothing where there is none."""
        if len(self._caught) == 1:
            raise self._caught[0]
        if self._caught:
            raise PlanError([problem for error in self._caught for problem in problems_of(error)])


_LONGEST = 200  # characters; comparing takes time in the square of the length


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def closest(word: str, options: Iterable[str]) -> str | None:
    """Return the nearest option; None if none is near."""
    likely = [k for k in options if len(k) <= _LONGEST] if len(word) <= _LONGEST else []
    return next(iter(difflib.get_close_matches(word, likely, n=1, cutoff=0.6)), None)


def nearest(word: str, options: Iterable[str]) -> str:
    """Return '; did you mean X?' for the nearest option; '' if none is near."""
    near = closest(word, options)
    return f"; did you mean {near!r}?" if near is not None else ""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return '; did you mean X?' for the nearest option, else '; known: A, B, C'."""
    known = list(options)
    return nearest(word, known) or (f"; known: {', '.join(sorted(known))}" if known else "")
