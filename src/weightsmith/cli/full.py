"""The command line as cyclopts reads it: every spelling, help, errors and completion."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import cyclopts

from weightsmith import __version__
from weightsmith.cli.words import Parameter, Verbs

__all__ = ["build"]

_STYLE: Mapping[str, Any] = {
    "help_format": "plaintext",
    "default_parameter": cyclopts.Parameter(negative=(), show_default=False),
    "suppress_keyboard_interrupt": False,
    "result_action": "return_value",
}


def build(summary: str, verbs: Mapping[str, str], completion: str) -> cyclopts.App:
    """The command line with all its verbs, none of them imported; what each is called is its help."""
    app = cyclopts.App(name="weightsmith", help=summary, version=__version__, version_flags=["--version"], **_STYLE)
    for position, (verb, text) in enumerate(verbs.items()):
        app.command(f"{__name__}:{_LAZY}{verb}", name=verb, help=text, sort_key=position)
    app.command(f"{__name__}:{_LAZY}completion", name="--install-completion", help=completion)
    return app


_LAZY = "verb_"


def __getattr__(name: str) -> Any:
    """The verb `merge` is `verb_merge` here; cyclopts asks for it by import, once it is used."""
    if not name.startswith(_LAZY):
        raise AttributeError(name)
    verb = name.removeprefix(_LAZY)
    found = getattr(importlib.import_module(f"weightsmith.cli.{verb}"), verb)
    if not isinstance(found, Verbs):
        return _annotated(found)
    app = cyclopts.App(name=verb, help=found.help, **_STYLE)
    if found.plain is not None:
        app.default(_annotated(found.plain))
    for inner in found.verbs:
        app.command(_annotated(inner))
    return app


def _annotated(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with annotations that cyclopts understands."""
    assert isinstance(verb, types.FunctionType)
    copy = types.FunctionType(verb.__code__, verb.__globals__, verb.__name__, verb.__defaults__, verb.__closure__)
    copy.__kwdefaults__, copy.__doc__ = verb.__kwdefaults__, verb.__doc__
    copy.__annotations__ = {n: _hint(hint) for n, hint in get_type_hints(verb, include_extras=True).items()}
    return copy


def _hint(hint: Any) -> Any:
    """The same annotation with what cyclopts is to know beside what we say."""
    if get_origin(hint) is not Annotated:
        return hint
    kind, *said = get_args(hint)
    if isinstance(kind, type) and is_dataclass(kind):
        _marked(kind)
    marks = [
        cyclopts.Parameter(**{k: v for k, v in mark._asdict().items() if v is not None})
        for mark in said
        if isinstance(mark, Parameter)
    ]
    return Annotated[kind, *said, *marks]


@cache
def _marked(kind: Any) -> None:
    """Mark the fields of a dataclass that are options.  The class stays: its values are the defaults of parameters."""
    for field in fields(kind):
        field.type = kind.__annotations__[field.name] = _hint(field.type)
