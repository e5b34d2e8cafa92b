"""What a verb says of its parameters, and command lines that are plain enough to be read from that alone.

cyclopts reads all the others (`cli.full`), and writes help, errors and completion.  Its import takes as long as a small
merge, so a line without fault or finesse does without: every word is an option by its full name, its value, or the
value of a positional parameter.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from weightsmith.core.errors import WeightsmithError

__all__ = ["Call", "Parameter", "Verbs", "read"]


class Parameter(NamedTuple):
    """In `Annotated`: what cyclopts should know of a parameter, see `cyclopts.Parameter`."""

    help: str | None = None
    name: str | Sequence[str] | None = None
    show_default: bool | None = None
    parse: bool | None = None
    group: str | None = None


class Verbs(NamedTuple):
    """A verb that has verbs of its own; `plain` is called where the first word names none of them."""

    help: str
    verbs: Sequence[Callable[..., Any]]
    plain: Callable[..., Any] | None = None


class Call(NamedTuple):
    """A verb with what it is called with."""

    verb: Callable[..., Any]
    positional: Sequence[Any]
    named: Mapping[str, Any]


class _Option(NamedTuple):
    """Where the value of an option goes: to a parameter, or to a field of one that is a dataclass."""

    parameter: str
    field: str
    kind: Any


def read(verb: Callable[..., Any] | Verbs, words: Sequence[str]) -> Call | None:
    """The call that these words mean; None: they are not plain enough to tell."""
    if isinstance(verb, Verbs):
        inner = next((one for one in verb.verbs if words and one.__name__ == words[0]), None)
        if inner is None:
            return None if verb.plain is None else read(verb.plain, words)
        return read(inner, words[1:])
    try:
        return _read(verb, words)
    except (LookupError, TypeError, ValueError, WeightsmithError):
        return None


def _read(verb: Callable[..., Any], words: Sequence[str]) -> Call:
    signature, hints = inspect.signature(verb), get_type_hints(verb, include_extras=True)
    positional: list[Any] = []
    places = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    if any(place.kind is not inspect.Parameter.POSITIONAL_ONLY for place in places):
        raise ValueError("takes any number of words")
    options = dict(_options(signature, hints))
    found: dict[tuple[str, str], Any] = {}
    left = iter(words)
    for word in left:
        if not word.startswith("-"):
            positional.append(_value(_kind(hints[places[len(positional)].name]), word))
            continue
        name, is_one, value = word.partition("=")
        parameter, field, kind = options[name]
        where = parameter, field
        many = get_origin(kind) is tuple and get_args(kind)[1:] == (...,)
        if where in found and not many:
            raise ValueError("is there twice")
        if kind is bool:
            if is_one:
                raise ValueError("says true or false")
            found[where] = True
        elif many:
            found[where] = (*found.get(where, ()), _value(get_args(kind)[0], value if is_one else _next(left)))
        else:
            found[where] = _value(kind, value if is_one else _next(left))
    named: dict[str, Any] = {}
    for (parameter, field), value in found.items():
        if field:
            named.setdefault(parameter, {})[field] = value
        else:
            named[parameter] = value
    for parameter, value in named.items():
        if isinstance(value, dict):
            named[parameter] = _kind(hints[parameter])(**value)
    signature.bind(*positional, **named)  # TypeError: something is missing
    return Call(verb, positional, named)


def _options(signature: inspect.Signature, hints: Mapping[str, Any]) -> Iterator[tuple[str, _Option]]:
    """Every long name of an option."""
    for parameter in signature.parameters.values():
        kind = _kind(hints[parameter.name])
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if not is_dataclass(kind):
            for name in _names(parameter.name, hints[parameter.name]):
                yield name, _Option(parameter.name, "", kind)
            continue
        for field in fields(kind):
            for name in _names(field.name, field.type):
                yield name, _Option(parameter.name, field.name, _kind(field.type))


def _names(name: str, hint: Any) -> Sequence[str]:
    """The words for a parameter: what it says, else its own name."""
    said = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Parameter)), Parameter())
    if said.parse is False:
        return ()
    words = said.name or f"--{name.strip('_').replace('_', '-')}"
    return [words] if isinstance(words, str) else words


def _kind(hint: Any) -> Any:
    """The type without what is annotated, and without None."""
    if get_origin(hint) is Annotated:
        return _kind(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _next(words: Iterator[str]) -> str:
    word = next(words, "-")
    if word.startswith("-"):
        raise ValueError("needs a value, or has one that looks like an option")
    return word


_PLAIN: Mapping[type, re.Pattern[str]] = {
    str: re.compile(r"[^\[{](.|\n)*"),  # which might be JSON
    Path: re.compile(r"[^\[{](.|\n)*"),
    int: re.compile(r"[0-9]+"),
    float: re.compile(r"[0-9]+(\.[0-9]+)?"),
}


def _value(kind: Any, word: str) -> Any:
    """A word as a value of this type, where nobody could read it differently."""
    if get_origin(kind) is Literal:
        return {member: member for member in get_args(kind)}[word]
    if not _PLAIN[kind].fullmatch(word):
        raise ValueError(f"{word!r} is not plainly {kind.__name__}")
    return kind(word)
