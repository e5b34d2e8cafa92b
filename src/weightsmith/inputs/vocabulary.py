"""Vocabulary, tokenizer and chat template: whether the models' go together, and whose go along."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import WeightsmithError, did_you_mean, some
from weightsmith.core.keys import LOGITS_BIAS, Key
from weightsmith.core.lazy import is_a
from weightsmith.core.problem import Code, Problem, told
from weightsmith.inputs.modules import modules_merged, unlike_modules
from weightsmith.inputs.opened import Inputs
from weightsmith.io import system
from weightsmith.io.architectures import LOOKED_UP
from weightsmith.io.package.companions import tokenizer_files, tokenizer_home, trained_modules
from weightsmith.io.package.template import AUTO, CHATML, most_common_template, template_of
from weightsmith.io.read.small import read_json
from weightsmith.io.read.source import Origin, Source
from weightsmith.io.read.vocabulary import difference, read_vocabulary
from weightsmith.recipe.schema import Recipe

if TYPE_CHECKING:
    from weightsmith.io.read.peft import AdapterSource

__all__ = [
    "chat_template",
    "is_of_tokens",
    "modules_beside",
    "outlook",
    "rows_problem",
    "tokenizer_folder",
    "tokenizer_problems",
    "vocabulary_problems",
    "what_is_lost",
]

_LIMIT = 16_000_000
_OTHER_ROWS = re.compile("|".join((*LOOKED_UP, "norm", "embed_positions", "pos_embed")), re.IGNORECASE)
"""In names of tensors beside embeddings whose rows are no tokens: `bert.embeddings.LayerNorm.weight`."""


def tokenizer_folder(recipe: Recipe, inputs: Inputs) -> Path | None:
    """The folder that `tokenizer:` names (the base, a model, or a path); None where the first model's goes along."""
    numbering = inputs.models[0][1].origin.numbering if inputs.models else None
    if numbering is not None:
        found: Path | None = numbering.new.folder
        return found
    if recipe.tokenizer is None or recipe.tokenizer.source == "union":
        return None
    named = dict(inputs.models).get(recipe.tokenizer.source)
    return tokenizer_home(named.origin) if named is not None else Path(recipe.tokenizer.source)


def vocabulary_problems(
    reference: Source, label: str, experts: Mapping[str, Source], merged: list[str]
) -> Iterable[Problem]:
    """Rows of merged embeddings must stand for the same tokens in every model."""
    if is_a(reference, "tokens.view", "VocabularyView"):
        return  # a view of every model in one vocabulary
    merged = [name for name in merged if not _OTHER_ROWS.search(name)]
    for name, source in experts.items() if merged else ():
        try:
            found = difference(_home(reference, merged), _home(source, merged)) if source is not reference else None
        except WeightsmithError as error:
            yield Problem(Code.VOCABULARY, name, f"{name}: {error}")
            continue
        if found:
            text = (
                f"unlike vocabularies in {label} and {name}: {found}; either give the models one vocabulary "
                f"(tokenizer: union, or a model's name), or keep the {label}'s rows "
                f"(exclude: {json.dumps(merged)}), or leave {name} out"
            )
            yield Problem(Code.VOCABULARY, name, text)


def _adapter_in(source: Source) -> AdapterSource | None:
    """See `io.read.peft`, which is loaded where there is an adapter."""
    if "weightsmith.io.read.peft" not in sys.modules:
        return None
    from weightsmith.io.read.peft import adapter_in

    return adapter_in(source)


def _home(source: Source, merged: Iterable[str]) -> Path | None:
    """The folder whose tokenizer numbers these rows: an adapter's own only where it trained some of them."""
    adapter = _adapter_in(source)
    untouched = adapter is not None and not any(name in adapter.changed for name in merged)
    return source.origin.folder if untouched else tokenizer_home(source.origin)


def rows_problem(models: Mapping[str, Source]) -> Problem:
    """What to say of two models with unlike numbers of tokens, once for all of their tensors: why, and the ways out."""
    (label, first), (other, second) = models.items()
    names = [
        key.name for key in first.keys.values()
        if is_of_tokens(key) and key.name in second.keys and second.key(key.name).shape != key.shape
    ]  # fmt: skip
    name = next((n for n in names if not n.endswith(LOGITS_BIAS)), names[0])
    rows = [source.key(name).shape[-1 if name.endswith(LOGITS_BIAS) else 0] for source in (first, second)]
    adapter = _adapter_in(second)
    choices = [f"keep the {label}'s rows (exclude: {json.dumps(names)})", f"leave {other} out"]
    if adapter is not None:
        choices.append(
            "merge it alone into its base (models: {x: {model: BASE, adapter: ADAPTER}}, method: passthrough)"
        )
    if not any(n.endswith(LOGITS_BIAS) for n in names):
        choices.insert(0, "give the models one vocabulary (tokenizer: union, or a model's name)")
    text = (
        f"unlike vocabularies: {name} has {rows[0]} rows in {label} and {rows[1]} in {other}"
        f"{_further(rows, (first, second))}; either {', or '.join(choices)}"
    )
    return Problem(Code.VOCABULARY, other, text)


def is_of_tokens(key: Key) -> bool:
    """Whether a tensor has a place for each token: embeddings, heads, and the bias of BART's logits [1, tokens]."""
    return key.role in ("embed", "head") or key.name.endswith(LOGITS_BIAS)


def _further(rows: Sequence[int], models: Sequence[Source]) -> str:
    """Whether the rows that only one of two models has stand for tokens, in words; '' where nothing tells."""
    from weightsmith.tokens.vocabulary import vocabulary_of

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


def tokenizer_problems(recipe: Recipe, inputs: Inputs) -> Iterable[Problem]:
    """What is wrong with `tokenizer` and `chat_template`; better known now than after the merge."""
    if (wanted := recipe.tokenizer) is not None and wanted.source not in inputs.missing:
        named = dict(inputs.models)
        if wanted.source != "union" and wanted.source not in named and not Path(wanted.source).is_dir():
            text = f"tokenizer: {wanted.source!r} is neither a folder nor a model{did_you_mean(wanted.source, named)}"
            yield Problem(Code.TOKENIZER, "tokenizer", text)
            return
        folder = tokenizer_folder(recipe, inputs)
        if wanted.source != "union" and (folder is None or not tokenizer_files(folder)):
            where = folder if folder is not None else wanted.source
            text = f"tokenizer: {where} holds no tokenizer files; name another model or folder"
            yield Problem(Code.TOKENIZER, "tokenizer", text)
    if recipe.chat_template in inputs.missing:
        return
    try:
        chat_template(recipe, inputs)
    except WeightsmithError as error:
        yield Problem(Code.TEMPLATE, "chat_template", str(error))


def chat_template(recipe: Recipe, inputs: Inputs) -> str | None:
    """The text of the result's chat template; None where it stays as it is.  Raises for one that is not there."""
    wanted = recipe.chat_template
    if wanted is None or "{" in wanted:
        return wanted
    named = dict(inputs.models)
    if wanted in named:
        found = own_template(named[wanted].origin)
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


def own_template(origin: Origin) -> str | None:
    """A source's chat template: an adapter's own, else its base's."""
    folders = (origin.checkpoint, origin.folder)
    return next((text for folder in folders if folder is not None and (text := template_of(folder))), None)


def what_is_lost(recipe: Recipe, inputs: Inputs) -> Iterator[Problem]:
    """What lies beside the models and will not be in the result, or comes from one of them."""
    if not inputs.models:
        return
    reference = inputs.models[0][1].origin
    home = tokenizer_folder(recipe, inputs) or reference.folder
    template = chat_template(recipe, inputs) or (template_of(home) if home is not None else None)
    ending = _ending(home)
    chosen = recipe.tokenizer.source if recipe.tokenizer is not None and reference.numbering is None else ""
    unlike = list(_unlike_ending(ending, home, reference)) if chosen and ending else []
    for name, source in inputs.experts.items():
        theirs, last = own_template(source.origin), _ending(tokenizer_home(source.origin))
        if theirs and theirs.strip() != (template or "").strip():
            state = "another" if template else "none"
            text = f"{name} has a chat template, the result will have {state} (chat_template: {name} takes it)"
            yield Problem(Code.TEMPLATE, name, text)
        if last and ending and last != ending:
            text = f"{name} ends with {last!r}, the result's tokenizer with {ending!r} (tokenizer: {name} takes its)"
            yield Problem(Code.TOKENIZER, name, text)
        if reference.numbering is None and home is not None:
            yield from _tokens_that_vanish(name, source.origin, home)
            if not unlike or name != chosen:
                yield from _unlike_stops(name, source.origin, reference)
    yield from unlike_modules(inputs.models)
    yield from told(Code.COMPANION, modules_beside(inputs)[1])
    yield from told(Code.TOKENIZER, unlike, "tokenizer")


def outlook(recipe: Recipe, inputs: Inputs, keys: Iterable[Key]) -> dict[str, str]:
    """What the result will be, in words: 'dtype', and of a model with tokens 'vocabulary' and 'chat_template'."""
    kinds: dict[str, int] = {}
    rows = 0
    for key in keys:
        if key.floating:
            kinds[key.dtype] = kinds.get(key.dtype, 0) + key.nbytes
        if key.role in ("embed", "head") and len(key.shape) == 2:
            rows = max(rows, key.shape[0])
    label, reference = inputs.models[0]
    why = "as output.dtype says" if recipe.output.dtype else f"as {label} stores them" if len(kinds) > 1 else ""
    found = {"dtype": " and ".join(sorted(kinds, key=lambda k: -kinds[k])) + (f" ({why})" if why else "")}
    folder = tokenizer_folder(recipe, inputs) or reference.origin.folder
    has_tokenizer = folder is not None and bool(tokenizer_files(folder))
    if not rows or not has_tokenizer:
        return found
    chosen = recipe.tokenizer.source if recipe.tokenizer is not None else label
    whose = "of all models together" if chosen == "union" else f"of {chosen}"
    found["vocabulary"] = f"vocabulary of {rows:,} rows, tokenizer {whose}"
    wanted, named = recipe.chat_template, chat_template(recipe, inputs)
    if named is not None:
        own = "that of the recipe" if wanted is not None and "{" in wanted else f"that of {wanted}"
        found["chat_template"] = f"chat template: {own}"
    else:
        there = folder is not None and template_of(folder) is not None
        found["chat_template"] = f"chat template: that {whose}" if there else "no chat template"
    return found


def _tokens_that_vanish(name: str, origin: Origin, home: Path) -> Iterator[Problem]:
    """Special tokens of an expert that the result's tokenizer lacks."""
    theirs, file = tokenizer_home(origin), "tokenizer.json"
    if theirs is not None and theirs != home and (home / file).is_file() and not _equal(home / file, theirs / file):
        try:
            known = read_vocabulary(home) or {}
        except WeightsmithError:  # nothing is lost that could be named; a merge that needs it reads it by itself
            known = {}
        special = [token for token in _special(theirs) if known and token not in known]
        if special:
            text = f"{name} has special tokens that the result's tokenizer lacks: {some(list(map(repr, special)))} "
            yield Problem(Code.TOKENIZER, name, text + "(tokenizer: union, or the model's name, takes them)")


def _unlike_stops(name: str, origin: Origin, reference: Origin) -> Iterator[Problem]:
    """Tokens that only an expert stops at."""
    folder = origin.checkpoint or origin.folder
    ours, stops = (_stops(_small(place, "generation_config.json")) for place in (reference.folder, folder))
    if ours and stops - ours:
        text = f"{name} stops at the tokens {sorted(stops)} (generation_config.json), the result at {sorted(ours)}: "
        yield Problem(Code.TOKENIZER, name, text + "set eos_token_id there if it should stop as that model does")


def _special(folder: Path) -> list[str]:
    """The tokens that a folder's tokenizer calls special."""
    added = _small(folder, "tokenizer.json", 10 * _LIMIT).get("added_tokens")
    found = [t.get("content") for t in added if isinstance(t, dict) and t.get("special")] if added else []
    further = _small(folder, "tokenizer_config.json").get("additional_special_tokens")
    return [token for token in dict.fromkeys((*found, *(further or ()))) if isinstance(token, str)]


def _stops(config: Mapping[str, Any]) -> set[int]:
    found = config.get("eos_token_id")
    return {n for n in (found if isinstance(found, list) else [found]) if isinstance(n, int)}


def modules_beside(inputs: Inputs) -> tuple[dict[str, Path], list[str]]:
    """Files of Sentence-Transformers modules that were trained beside an adapter, and what to say of them."""
    files: dict[str, Path] = {}
    says: list[str] = []
    taken = ""
    if modules_merged(inputs.models):
        return files, says
    for name, source in inputs.experts.items():
        own = trained_modules(source.origin)
        unlike = [
            file
            for file, folder in own.items()
            if not _equal(folder / file, (files.get(file) or source.origin.folder or folder) / file)
        ]
        if taken and unlike:
            says.append(f"{some(unlike)}: taken from {taken}, which was trained with them; those of {name} are dropped")
        elif own and unlike:
            files, taken = own, name
            says.append(f"{some(unlike)}: taken from {name} as trained there, whatever its weight")
    return files, says


def _equal(one: Path, other: Path) -> bool:
    return other.is_file() and system.read_file(one) == system.read_file(other)


def _unlike_ending(ending: str, home: Path | None, reference: Origin) -> Iterator[str]:
    """Where the tokenizer that was chosen ends a text with a token that generation does not stop at."""
    from weightsmith.tokens.vocabulary import read_tokens

    tokens = read_tokens(home) if home is not None else None
    number = None if tokens is None else tokens.ids.get(ending)
    files = ("generation_config.json", "config.json")
    said = {file: found for file in files if (found := _small(reference.folder, file).get("eos_token_id")) is not None}
    other = {
        file: found for file, found in said.items() if number not in (found if isinstance(found, list) else [found])
    }
    if number is not None and other:
        stops = ", ".join(f"{file} stops at {found}" for file, found in other.items())
        yield f"the tokenizer ends with {ending!r} ({number}), {stops}: set eos_token_id there"


def _ending(folder: Path | None) -> str | None:
    """The token that a folder's tokenizer ends a text with."""
    found = _small(folder, "tokenizer_config.json").get("eos_token")
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else None


def _small(folder: Path | None, file: str, limit: int = _LIMIT) -> dict[str, Any]:
    path = None if folder is None else folder / file
    found = read_json(path, limit) if path is not None and path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _folders(inputs: Inputs) -> list[Path]:
    return [location for location in inputs.locations() if location.is_dir()]
