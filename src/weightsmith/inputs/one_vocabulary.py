"""Giving the models of a recipe one vocabulary before they are merged, as its `tokenizer` says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.core.errors import WeightsmithError, problems_of
from weightsmith.core.problem import Code, Problem
from weightsmith.io.read.source import Source
from weightsmith.ops.moments import CALLED
from weightsmith.recipe.schema import Tokenizer
from weightsmith.tokens.layout import lay_out, read_rule
from weightsmith.tokens.numbering import Numbering, special_numbers
from weightsmith.tokens.view import RenumberedSource, RenumberedStatistic
from weightsmith.tokens.vocabulary import (
    Vocabulary,
    read_tokens,
    unite,
    vocabulary_of,
    vocabulary_tensors,
    with_tokens,
)

__all__ = ["in_one_vocabulary", "statistics_in"]


def in_one_vocabulary(wanted: Tokenizer, models: Mapping[str, Source]) -> tuple[Mapping[str, Source], list[Problem]]:
    """The models in one vocabulary, and what is wrong; the base, if there is one, is the model 'base'.

    Models whose vocabularies and rows are alike stay as they are, unless a rule changes a row.
    """
    if not models:
        return models, []
    try:
        return _renumbered(wanted, models), []
    except WeightsmithError as error:
        return models, [Problem(Code.TOKENIZER, one.where, f"tokenizer: {one.text}") for one in problems_of(error)]


def statistics_in(
    models: Mapping[str, Source], statistics: Mapping[str, Mapping[str, Source]]
) -> dict[str, dict[str, Source]]:
    """Statistic -> model -> source, those with a value per weight numbered as the models are now."""
    made = {stat: dict(found) for stat, found in statistics.items()}
    for stat in made.keys() & CALLED.keys():
        for name, source in made[stat].items():
            model = models.get(name)
            made[stat][name] = RenumberedStatistic(source, model) if isinstance(model, RenumberedSource) else source
    return made


def _renumbered(wanted: Tokenizer, models: Mapping[str, Source]) -> Mapping[str, Source]:
    tensors = {name: vocabulary_tensors(source) for name, source in models.items()}
    known = {name: vocabulary_of(source) for name, source in models.items()}
    tokenizer = next(iter(known.values())) if wanted.source == "union" else _named(wanted.source, known)
    changes = bool(wanted.tokens) or wanted.pad_to_multiple_of is not None
    asked = wanted.source == "union" and (changes or any(known.values()))
    if not any(names for names, _ in tensors.values()) or (tokenizer is None and not asked):
        return models  # a tokenizer that is named and not there is said elsewhere
    rows = {name: count for name, (_, count) in tensors.items()}
    first = None if tokenizer is None else tokenizer.ids
    alike = all(v is None or v.ids == first for v in known.values()) and len(set(rows.values())) == 1
    if alike and not changes:
        return models
    vocabularies: dict[str, Vocabulary] = {}
    for name, vocabulary in known.items():
        if vocabulary is None:
            raise WeightsmithError(
                f"{name} has no tokenizer files, so nothing tells which token each of its rows stands for; "
                f"put its tokenizer into its folder, or leave {name} out"
            )
        vocabularies[name] = vocabulary
    output = tokenizer or next(iter(vocabularies.values()))
    if wanted.source == "union":
        output = unite([(vocabulary, rows[name]) for name, vocabulary in vocabularies.items()])
    names = tuple(models)
    rules = {token: read_rule(token, given, names) for token, given in wanted.tokens.items()}
    output = with_tokens(output, {token: {} for token in rules})
    _may_grow(output, wanted)
    layout = lay_out(
        {name: v.ids for name, v in vocabularies.items()},
        rows,
        output.ids,
        base="base" if "base" in models else None,
        rules={token: rule for token, rule in rules.items() if rule is not None},
        multiple=wanted.pad_to_multiple_of,
    )
    others = special_numbers(output.folder)
    return {
        name: RenumberedSource(
            source,
            name,
            models,
            layout,
            tensors[name][0],
            Numbering(vocabularies[name], output, (rows[name], layout.rows), others, before=source.origin.numbering),
        )
        for name, source in models.items()
    }


def _named(source: str, known: Mapping[str, Vocabulary | None]) -> Vocabulary | None:
    if source in known:
        return known[source]
    return read_tokens(Path(source)) if Path(source).is_dir() else None


def _may_grow(output: Vocabulary, wanted: Tokenizer) -> None:
    """Refuse tokens that the tokenizer's files cannot take."""
    if not output.fresh or (output.kind != "Unigram" and _has_json(output.folder)):
        return
    why = "is a Unigram tokenizer" if output.kind == "Unigram" else "has no tokenizer.json"
    first = output.fresh[0]["content"]
    raise WeightsmithError(
        f"{len(output.fresh)} tokens (the first is {first!r}) cannot be added to the tokenizer in {output.folder}, "
        f"which {why}; "
        + ("take one model's tokenizer (tokenizer: NAME)" if wanted.source == "union" else "leave them out")
    )


def _has_json(folder: Path | None) -> bool:
    return folder is not None and (folder / "tokenizer.json").is_file()
