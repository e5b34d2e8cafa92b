"""Vocabulary, tokenizer and chat template: whether the models' go together, and whose go along."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from weightsmith.core.errors import WeightsmithError, did_you_mean
from weightsmith.core.keys import Key
from weightsmith.inputs.opened import Inputs
from weightsmith.io.package.companions import tokenizer_files
from weightsmith.io.package.template import AUTO, CHATML, most_common_template, template_of
from weightsmith.io.read.source import Source
from weightsmith.io.read.vocabulary import difference
from weightsmith.recipe.schema import Recipe
from weightsmith.tokens.view import VocabularyView
from weightsmith.tokens.vocabulary import LOGITS_BIAS, vocabulary_of

__all__ = [
    "chat_template",
    "is_of_tokens",
    "rows_problem",
    "tokenizer_folder",
    "tokenizer_problems",
    "vocabulary_problems",
]


def tokenizer_folder(recipe: Recipe, inputs: Inputs) -> Path | None:
    """The folder that `tokenizer:` names (the base, a model, or a path); None where the first model's goes along."""
    numbering = inputs.models[0][1].origin.numbering if inputs.models else None
    if numbering is not None:
        found: Path | None = numbering.new.folder
        return found
    if recipe.tokenizer is None or recipe.tokenizer.source == "union":
        return None
    named = dict(inputs.models).get(recipe.tokenizer.source)
    return named.origin.folder if named is not None else Path(recipe.tokenizer.source)


def vocabulary_problems(
    reference: Source, label: str, experts: Mapping[str, Source], merged: list[str]
) -> Iterable[str]:
    """Rows of merged embeddings must stand for the same tokens in every model."""
    if isinstance(reference, VocabularyView):
        return  # a view of every model in one vocabulary
    for name, source in experts.items() if merged else ():
        try:
            found = difference(reference.origin.folder, source.origin.folder) if source is not reference else None
        except WeightsmithError as error:
            yield f"{name}: {error}"
            continue
        if found:
            yield (
                f"unlike vocabularies in {label} and {name}: {found}; either give the models one vocabulary "
                f"(tokenizer: union, or a model's name), or keep the {label}'s rows "
                f"(exclude: {json.dumps(merged)}), or leave {name} out"
            )


def rows_problem(models: Mapping[str, Source]) -> str:
    """What to say of two models with unlike numbers of tokens, once for all of their tensors: why, and the ways out."""
    (label, first), (other, second) = models.items()
    names = [
        key.name for key in first.keys.values()
        if is_of_tokens(key) and key.name in second.keys and second.key(key.name).shape != key.shape
    ]  # fmt: skip
    name = next((n for n in names if not n.endswith(LOGITS_BIAS)), names[0])
    rows = [source.key(name).shape[-1 if name.endswith(LOGITS_BIAS) else 0] for source in (first, second)]
    choices = [f"keep the {label}'s rows (exclude: {json.dumps(names)})", f"leave {other} out"]
    if not any(n.endswith(LOGITS_BIAS) for n in names):
        choices.insert(0, "give the models one vocabulary (tokenizer: union, or a model's name)")
    return (
        f"unlike vocabularies: {name} has {rows[0]} rows in {label} and {rows[1]} in {other}"
        f"{_further(rows, (first, second))}; either {', or '.join(choices)}"
    )


def is_of_tokens(key: Key) -> bool:
    """Whether a tensor has a place for each token: embeddings, heads, and the bias of BART's logits [1, tokens]."""
    return key.role in ("embed", "head") or key.name.endswith(LOGITS_BIAS)


def _further(rows: Sequence[int], models: Sequence[Source]) -> str:
    """Whether the rows that only one of two models has stand for tokens, in words; '' where nothing tells."""
    larger = models[rows.index(max(rows))]
    try:
        known = vocabulary_of(larger)
    except WeightsmithError:
        return ""
    if known is None:
        return ""
    tokens = [known.tokens[number] for number in range(min(rows), max(rows)) if number in known.tokens]
    count = max(rows) - min(rows)
    if not tokens:
        return f" (the {count} further rows are padding)"
    return f" (of the {count} further rows {len(tokens)} are tokens, the first {tokens[0]!r})"


def tokenizer_problems(recipe: Recipe, inputs: Inputs) -> Iterable[str]:
    """What is wrong with `tokenizer` and `chat_template`; better known now than after the merge."""
    if (wanted := recipe.tokenizer) is not None:
        named = dict(inputs.models)
        if wanted.source != "union" and wanted.source not in named and not Path(wanted.source).is_dir():
            yield f"tokenizer: {wanted.source!r} is neither a folder nor a model{did_you_mean(wanted.source, named)}"
            return
        folder = tokenizer_folder(recipe, inputs)
        if wanted.source != "union" and (folder is None or not tokenizer_files(folder)):
            where = folder if folder is not None else wanted.source
            yield f"tokenizer: {where} holds no tokenizer files; name another model or folder"
    try:
        chat_template(recipe, inputs)
    except WeightsmithError as error:
        yield str(error)


def chat_template(recipe: Recipe, inputs: Inputs) -> str | None:
    """The text of the result's chat template; None where it stays as it is.  Raises for one that is not there."""
    wanted = recipe.chat_template
    if wanted is None or "{" in wanted:
        return wanted
    named = dict(inputs.models)
    if wanted in named:
        folder = named[wanted].origin.folder
        found = template_of(folder) if folder is not None else None
    elif wanted == AUTO:
        found = most_common_template(_folders(inputs))
    elif wanted == "chatml":
        found = CHATML
    else:
        options = [AUTO, "chatml", *named]
        raise WeightsmithError(
            f"chat_template: {wanted!r} is no Jinja text and no model{did_you_mean(wanted, options)}; "
            f"write the template's text, or name a model that has it"
        )
    if found is None and wanted != AUTO:
        raise WeightsmithError(f"chat_template: {wanted} has no chat template; name another model")
    return found


def _folders(inputs: Inputs) -> list[Path]:
    return [location for location in inputs.locations() if location.is_dir()]
