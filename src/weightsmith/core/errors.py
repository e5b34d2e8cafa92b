"""Every error that weightsmith raises on purpose.

    WeightsmithError          exit code 2, one line, no traceback
    ├── RecipeError           the recipe says something that cannot be meant; carries all problems at once
    ├── SourceError           an input cannot be read, or lies about itself
    ├── PlanError             recipe and inputs do not go together; carries all problems at once
    ├── NumericError          NaN, Inf or overflow, with tensor, model and place
    ├── OutputError           the output folder cannot be written, resumed or verified
    │   └── NotKept           what was made is not worth keeping; nothing of it is left
    └── MissingExtra          an optional package is needed; the text holds the pip command

A text says what, where, which value, and what to do about it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

__all__ = [
    "MissingExtra",
    "NotKept",
    "NumericError",
    "OutputError",
    "PlanError",
    "RecipeError",
    "SourceError",
    "WeightsmithError",
    "did_you_mean",
    "problems_of",
    "public",
    "some",
]


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


class WeightsmithError(Exception):
    """Root of the tree; the command line prints its text and exits with `code`.

    Names from files stand in the texts: what could drive a terminal or end a line in a log is spelt out (\\x1b).
    Addresses do too: their passwords and query strings are left out (`public`).
    """

    code = 2
    problems: tuple[str, ...] = ()
    """Every one of several, where the error carries more than its text."""

    def __init__(self, text: str = "") -> None:
        shown = public(text) if ":/" in text or "hf_" in text else text
        super().__init__("".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in shown))


_MOST = 50  # problems shown of one recipe


def _listed(problems: Sequence[str], most: int | None = None) -> str:
    """One problem as it is, several as a list under their number."""
    if len(problems) == 1:
        return problems[0]
    more = len(problems) - len(problems[:most])
    lines = [*problems[:most], *([f"and {more} more"] if more else [])]
    return "\n".join([f"{len(problems)} problems:", *(f"  - {line}" for line in lines)])


class RecipeError(WeightsmithError):
    """The recipe is wrong in itself (unknown key, value out of range, contradictory parts).

    `problems` holds every one of them, a line each; of very many the text shows the first.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(map(public, problems))
        super().__init__(_listed(self.problems, _MOST))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, ...]]:
        return RecipeError, self.problems


class SourceError(WeightsmithError):
    """An input is missing, truncated, hostile or of an unknown kind."""


class PlanError(WeightsmithError):
    """Recipe and inputs do not fit.  `problems` holds every one of them, a line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(map(public, problems))
        super().__init__(_listed(self.problems))

    def __reduce__(self) -> tuple[type[PlanError], tuple[tuple[str, ...]]]:
        return PlanError, (self.problems,)


class NumericError(WeightsmithError):
    """A value that is not a finite number was found, or would be written."""


class OutputError(WeightsmithError):
    """The output folder is in the way, in use, damaged, or belongs to another recipe."""


class NotKept(OutputError):
    """What was made turned out to be of no use: nothing of it is left, not even to resume."""


class MissingExtra(WeightsmithError):
    """An optional package is not installed.  `extra` is weightsmith's, or '' where the package goes by itself."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package, self.extra, self.purpose = package, extra, purpose
        what = f"'weightsmith[{extra}]'" if extra else package
        super().__init__(f"{purpose} needs {package}; install it with: pip install {what}")

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str, str]]:
        return MissingExtra, (self.package, self.extra, self.purpose)


def problems_of(error: WeightsmithError) -> tuple[str, ...]:
    """What an error complains of, one by one."""
    return error.problems or (str(error),)


_LONGEST = 200  # characters; comparing takes time in the square of the length


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return '; did you mean X?' for the nearest option, else '; known: A, B, C'."""
    known = list(options)
    likely = [k for k in known if len(k) <= _LONGEST] if len(word) <= _LONGEST else []
    near = difflib.get_close_matches(word, likely, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""
