"""An audit as tables, plain values, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from weightsmith.protect.audit import Audit, plain_words
from weightsmith.protect.damage import Score
from weightsmith.protect.outliers import CAVEAT, RULES
from weightsmith.report.html import page
from weightsmith.report.table import Column, Table

__all__ = ["as_page", "plain", "tables"]


def plain(found: Audit) -> dict[str, Any]:
    """As JSON has it; scores of merges by name, the words, and the rules behind the outliers."""
    return {
        **asdict(found),
        "alone": {name: _score(score) for name, score in found.alone.items()},
        "damage": [
            {"method": d.method, "partner": d.partner, "why": d.why,
             **{name: _score(getattr(d, name)) for name in ("given", "restored", "unlocked")}}
            for d in found.damage
        ],
        "rules": dict(RULES),
        "caveat": CAVEAT,
        "words": plain_words(found),
    }  # fmt: skip


def _score(score: Score | None) -> dict[str, float] | None:
    return None if score is None else {**asdict(score), "perplexity": score.perplexity}


def tables(found: Audit) -> list[tuple[str, Sequence[str], list[tuple[object, ...]], Sequence[int]]]:
    """(title, columns, rows, which columns are numbers) of every table that has rows."""
    figure = "perplexity" if found.words else "accuracy"
    alone = [(name, _figure(score, found.words)) for name, score in found.alone.items()]
    merged = [
        (d.method, d.partner, _figure(d.given, found.words), _figure(d.restored, found.words),
         _figure(d.unlocked, found.words), d.why)
        for d in found.damage
    ]  # fmt: skip
    columns = ["merge", "with", "as it is", "after the attack", "unlocked", ""]
    strange = [
        (o.tensor, o.rule, f"{o.here:.3g}", "–" if o.others is None else f"{o.others:.3g}", RULES[o.rule])
        for o in found.outliers
    ]
    everything: list[tuple[str, Sequence[str], list[tuple[object, ...]], Sequence[int]]] = [
        (f"{figure} of each by itself", ["model", figure], [*alone], (1,)),
        (f"{figure} of merges with the model", columns, [*merged], (2, 3, 4)),
        ("tensors unlike those of the others", ["tensor", "rule", "here", "others", "what the rule says"],
         [*strange], (2, 3)),
    ]  # fmt: skip
    return [one for one in everything if one[2]]


def _figure(score: Score | None, words: bool) -> str:
    if score is None:
        return "–"
    return f"{score.perplexity:,.4g}" if words else f"{score.accuracy:.1%}"


def as_page(found: Audit) -> str:
    """The words and the tables as an HTML page."""
    said = [(line,) for line in [*plain_words(found), f"Of outliers: {CAVEAT}."]]
    first: tuple[str, Sequence[str], list[tuple[object, ...]], Sequence[int]] = ("What this says", [""], [*said], ())
    shown = [first, *tables(found)]
    made = []
    for title, columns, rows, _ in shown:
        named = tuple(Column(str(i), name) for i, name in enumerate(columns))
        made.append(Table(title, named, [{str(i): cell for i, cell in enumerate(row)} for row in rows]))
    return page(f"Audit of {found.model}", made)
