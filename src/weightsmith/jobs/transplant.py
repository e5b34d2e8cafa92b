"""Moving a model to another tokenizer: `weightsmith tokenizer transplant`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError, WeightsmithError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.jobs.job import Result
from weightsmith.jobs.merge import run
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec, Tokenizer
from weightsmith.tokens.numbering import Numbering, special_numbers
from weightsmith.tokens.pairing import Pairing, pair, pieces_of, role_numbers, undertrained
from weightsmith.tokens.transplant import Transplant, TransplantedSource
from weightsmith.tokens.vocabulary import Vocabulary, vocabulary_of, vocabulary_tensors

__all__ = ["inputs_of", "transplant", "transplanted"]


def transplant(
    model: str | Path | Source,
    donor: str | Path | Source,
    out: Path,
    how: Transplant | None = None,
    settings: Settings = DEFAULT,
    **options: Any,
) -> tuple[Result, Pairing]:
    """Write `model` with the tokenizer of `donor` into the folder `out`; also returns what became of the tokens.

    Rows of tokens that both have are kept to the bit; those that only the donor has are made as `how` says, from
    the donor's rows.  Everything that is no row of a token is copied.  Options change single settings.
    Raises PlanError, SourceError.
    """
    settings = settings.but(**options)
    source, other = open_source(model), open_source(donor)
    other.prepare()
    view = transplanted(source, other, how or Transplant())
    if settings.memory is not None and view.origin.cost.held > settings.memory / 2:
        view = transplanted(source, other, replace(view.how, table=False))
    recipe = Recipe(
        models={"model": ModelRef(model=str(model) if isinstance(model, (str, Path)) else source.origin.label)},
        method=(StageSpec(name="passthrough"),),
        tokenizer=Tokenizer(source=str(other.origin.folder)),
    )
    result = run(recipe, out, settings, sources=Inputs(None, {"model": view}))
    return result, next(iter(view.pairings.values()))


def inputs_of(recipe: Recipe, noted: Any) -> Inputs | None:
    """The inputs of a transplant that weightsmith.json tells of; None if it tells of something else.

    noted  what it says of the input `model`: the transplant's settings are a part of that
    """
    how = noted.get("transplant") if isinstance(noted, dict) else None
    if how is None:
        return None
    if recipe.tokenizer is None or not isinstance(how, dict) or how.keys() != {f.name for f in fields(Transplant)}:
        raise SourceError("the transplant in weightsmith.json is not one of this version")
    model, donor = open_source(recipe.models["model"].model), open_source(recipe.tokenizer.source)
    donor.prepare()
    return Inputs(None, {"model": transplanted(model, donor, Transplant(**how))})


def transplanted(source: Source, donor: Source, how: Transplant) -> TransplantedSource:
    """The model as it is with the donor's tokenizer; nothing but headers and tokenizers is read, but for `magikarp`."""
    ours, theirs = (_vocabulary(each) for each in (source, donor))
    names, count = _tensors(source)
    donor_names, donor_count = _tensors(donor)
    by_role = {donor.key(name).role: name for name in donor_names if len(donor.key(name).shape) == 2}
    pairs = {n: by_role.get(source.key(n).role, donor_names[0]) for n in names if len(source.key(n).shape) == 2}
    bad = (undertrained(source, names, ours), undertrained(donor, donor_names, theirs)) if how.magikarp else None
    pieces = pieces_of(ours, theirs, count) if how.method == "subword" else None

    def pairing(place: str) -> Pairing:
        return pair(
            ours,
            theirs,
            (count, donor_count),
            multiple=how.multiple,
            by_prefix=how.prefix_match in ("yes", place),
            by_byte=how.byte_match in ("yes", place),
            bad=bad,
            pieces=pieces,
        )

    found = {place: pairing(place) for place in ("embed", "lm_head")}
    tokens = {name: found["lm_head" if source.key(name).role == "head" else "embed"] for name in names}
    others = {**role_numbers(theirs), **special_numbers(donor.origin.folder)}
    numbering = Numbering(ours, theirs, (count, found["embed"].rows), others, own_first=False)
    return TransplantedSource(source, donor, pairs, tokens, how, numbering)


def _vocabulary(source: Source) -> Vocabulary:
    found = vocabulary_of(source)
    if found is None:
        raise SourceError(f"{source} has no tokenizer files; put its tokenizer into its folder")
    return found


def _tensors(source: Source) -> tuple[tuple[str, ...], int]:
    names, rows = vocabulary_tensors(source)
    first = tuple(sorted(names, key=lambda name: source.key(name).role != "embed"))
    if not names or source.key(first[0]).role != "embed":
        raise WeightsmithError(f"{source} has no embedding with a row for each token")
    return first, rows
