"""Plain command lines are read without cyclopts, and mean what they mean to it."""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any

import pytest

from weightsmith.cli import main as cli
from weightsmith.cli import words as plain
from weightsmith.cli.words import Call, Verbs

WORDS = ("3", "0.5", "12", "word", "a b", "./folder", "mean", "gram", "loss", "quick", "zero", "x=y", "", "1e3", "-1",
         "--", "[1]", '{"a": 1}', "é", "007", "+3", "1_000", "0x10", " 5", "٣")  # fmt: skip


def every() -> Iterator[tuple[list[str], Callable[..., Any]]]:
    """(words, function) of every verb."""
    for verb in cli._VERBS:
        found = getattr(importlib.import_module(f"weightsmith.cli.{verb}"), verb)
        for one in found.verbs if isinstance(found, Verbs) else [found]:
            yield ([verb, one.__name__] if isinstance(found, Verbs) else [verb]), one
        if isinstance(found, Verbs) and found.plain is not None:
            yield [verb], found.plain


VERBS = {" ".join(words): (words, one) for words, one in every()}


def bound(call: Call) -> dict[str, Any]:
    """What the parameters are called with."""
    signature = inspect.signature(call.verb)
    return told(signature.bind(*call.positional, **call.named))


def told(arguments: inspect.BoundArguments) -> dict[str, Any]:
    given = arguments.arguments.items()
    return {name: asdict(value) if is_dataclass(value) else value for name, value in given}  # type: ignore[arg-type]


def by_cyclopts(words: list[str]) -> dict[str, Any] | None:
    try:
        _, arguments, _ = cli.build().parse_args(words, exit_on_error=False, print_error=False)
    except Exception:  # whatever is wrong
        return None
    return told(arguments)


def lines(one: Callable[..., Any], seed: int) -> Iterator[list[str]]:
    """Command lines, most of them nearly right."""
    draw = random.Random(seed)
    parameters = inspect.signature(one).parameters.values()
    places = sum(parameter.kind is inspect.Parameter.POSITIONAL_ONLY for parameter in parameters)
    options = [
        name for name, _ in plain._options(inspect.signature(one), plain.get_type_hints(one, include_extras=True))
    ]
    for _ in range(40):
        words = [draw.choice(WORDS[:8]) for _ in range(max(places - (draw.random() < 0.2), 0))]
        for name in draw.sample(options, min(len(options), draw.randrange(4))):
            value = draw.choice(WORDS)
            said = draw.choice([[name], [name, value], [name, value], [f"{name}={value}"], [name, value, name, value]])
            at = draw.randrange(len(words) + 1)
            words[at:at] = said
        yield words


@pytest.mark.parametrize("verb", VERBS)
def test_a_plain_line_means_what_it_means_to_cyclopts(verb: str) -> None:
    words, one = VERBS[verb]
    for line in lines(one, seed=len(verb)):
        call = plain.read(one, line)
        if call is not None:
            assert by_cyclopts([*words, *line]) == bound(call), line


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("recipe.yaml out --quiet", {"quiet": True}),
        ("recipe.yaml --set parameters.density=0.3 --set seed=1 out", {"set_": ("parameters.density=0.3", "seed=1")}),
        ("recipe.yaml out --threads 2 --memory=4GB --overwrite", {"settings": {"threads": 2, "overwrite": True}}),
    ],
)
def test_usual_lines_are_plain(line: str, named: dict[str, Any]) -> None:
    call = plain.read(VERBS["merge"][1], line.split())
    assert call is not None
    found = bound(call)
    for name, value in named.items():
        if isinstance(value, dict):
            assert value.items() <= found[name].items()
        else:
            assert found[name] == value


@pytest.mark.parametrize(
    "line",
    [
        "recipe.yaml",
        "recipe.yaml out more",
        "recipe.yaml out --help",
        "recipe.yaml out -q",
        "recipe.yaml out --thread 2",
        "recipe.yaml out --threads",
        "recipe.yaml out --threads two",
        "recipe.yaml out --threads 2 --threads 3",
        "recipe.yaml out --quiet=true",
        "recipe.yaml out --fingerprint half",
        "recipe.yaml out --progress x",
        "recipe.yaml -- out",
    ],
)
def test_other_lines_are_left_to_cyclopts(line: str) -> None:
    assert plain.read(VERBS["merge"][1], line.split()) is None
