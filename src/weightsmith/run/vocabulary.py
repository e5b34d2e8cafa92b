"""Vocabulary, tokenizer and chat template: whether the models' go together, and whose go along."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from weightsmith.errors import WeightsmithError, did_you_mean
from weightsmith.io.package import tokenizer_files
from weightsmith.io.source import Source
from weightsmith.io.template import AUTO, CHATML, most_common_template, template_of
from weightsmith.io.vocabulary import difference, read_vocabulary
from weightsmith.recipe.schema import Recipe, Tokenizer
from weightsmith.run.inputs import Inputs

__all__ = ["chat_template", "tokenizer_folder", "tokenizer_problems", "vocabulary_problems"]


def tokenizer_folder(recipe: Recipe, inputs: Inputs) -> Path | None:
    """The folder that `tokenizer:` names (the base, a model, or a path); None where the first model's goes along."""
    if recipe.tokenizer is None or recipe.tokenizer.source == "union":
        return None
    named = dict(inputs.models).get(recipe.tokenizer.source)
    return named.folder if named is not None else Path(recipe.tokenizer.source)


def vocabulary_problems(
    reference: Source, label: str, experts: Mapping[str, Source], merged: list[str]
) -> Iterable[str]:
    """Rows of merged embeddings must stand for the same tokens in every model."""
    for name, source in experts.items() if merged else ():
        try:
            found = difference(reference.folder, source.folder) if source is not reference else None
        except WeightsmithError as error:
            yield f"{name}: {error}"
            continue
        if found:
            yield (
                f"unlike vocabularies in {label} and {name}: {found}; either give the models one vocabulary first, "
                f"or keep the {label}'s rows (exclude: {json.dumps(merged)}), or leave {name} out"
            )


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
        if text := _not_yet(wanted, inputs):
            yield text
    try:
        chat_template(recipe, inputs)
    except WeightsmithError as error:
        yield str(error)


def _not_yet(wanted: Tokenizer, inputs: Inputs) -> str | None:
    """What asks for new rows in the embeddings, which nothing here makes."""
    if wanted.tokens or wanted.pad_to_multiple_of is not None:
        asked = "tokens" if wanted.tokens else "pad_to_multiple_of"
        return f"tokenizer: {asked} asks for new rows of the embeddings, which cannot be made yet; leave it out"
    if wanted.source != "union":
        return None
    known = {place: found for place in _folders(inputs) if (found := read_vocabulary(place)) is not None}
    first = next(iter(known), None)
    for place, theirs in known.items():
        if first is not None and theirs != known[first]:
            return (
                f"tokenizer: the vocabularies of {first} ({len(known[first])} tokens) and {place} ({len(theirs)}) are "
                f"unlike, and their union cannot be made yet; give the models one vocabulary first"
            )
    return None


def chat_template(recipe: Recipe, inputs: Inputs) -> str | None:
    """The text of the result's chat template; None where it stays as it is.  Raises for one that is not there."""
    wanted = recipe.chat_template
    if wanted is None or "{" in wanted:
        return wanted
    named = dict(inputs.models)
    if wanted in named:
        folder = named[wanted].folder
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
    return [place for place in inputs.places() if place.is_dir()]
