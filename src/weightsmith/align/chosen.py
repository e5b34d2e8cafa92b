"""Which groups of two models are matched: not those that are to stay, and none of models that are unlike."""

from __future__ import annotations

from collections.abc import Sequence

from weightsmith.align.layout import RESIDUAL, Layout, layout
from weightsmith.align.proof import proved
from weightsmith.core.errors import RecipeError, SourceError, did_you_mean, some
from weightsmith.io.read.source import Source

__all__ = ["NOTHING", "matchable"]

NOTHING = "nothing"
"""Given as the only name to freeze: also the residual stream moves, whatever the models have in common."""

_LOOKED_AT = 1 << 22  # entries of the embedding that tell whether two models come from one
_RELATED = 0.5  # their cosine from which on they do: independent models are near 0, fine-tunes above 0.99


def matchable(moving: Source, reference: Source, freeze: Sequence[str] | None) -> Layout:
    """The groups of `moving`, proved, without those that are to stay.

    freeze  groups or kinds of groups; None: the residual stream, if the models come from one
    Raises SourceError for models that differ in names, shapes or heads, and where nothing is left; RecipeError for
    groups that there are not.
    """
    _refuse_unlike(moving, reference)
    found = _chosen(proved(moving), freeze, moving, reference)
    if not found.groups:
        raise SourceError(f"{moving}: nothing of it may be permuted: {some([*dict.fromkeys(found.frozen.values())])}")
    return found


def _refuse_unlike(moving: Source, reference: Source) -> None:
    mine, theirs = ({n: k.shape for n, k in source.keys.items()} for source in (moving, reference))
    if alone := [*(mine.keys() ^ theirs.keys())]:
        where = "moving model" if alone[0] in mine else "reference"
        raise SourceError(f"{moving} and {reference} do not have the same tensors: {alone[0]} is in the {where} only")
    if unlike := [name for name in mine if mine[name] != theirs[name]]:
        name = unlike[0]
        raise SourceError(f"{name} is {list(mine[name])} in {moving} and {list(theirs[name])} in {reference}")
    if (ours := set(layout(moving).groups)) != (other := set(layout(reference).groups)):
        name = min(group.name for group in ours ^ other)
        raise SourceError(f"{moving} and {reference} are not built alike: {name} differs, as config.json describes it")


def _chosen(found: Layout, freeze: Sequence[str] | None, moving: Source, reference: Source) -> Layout:
    if freeze is not None:
        names = [name for name in freeze if name != NOTHING]
        known = [word for group in found.groups for word in (group.name, group.kind)]
        for name in names:
            if name not in known and name not in found.frozen:
                raise RecipeError(f"no group is called {name!r}{did_you_mean(name, known)}")
        return found.without(names, "as asked for")
    cosine = _cosine(found, moving, reference)
    if cosine >= _RELATED:
        return found.without([RESIDUAL], f"the models come from one: their embeddings have a cosine of {cosine:.3f}")
    return found


def _cosine(found: Layout, moving: Source, reference: Source) -> float:
    """How alike the models are in the tensor that ties the residual stream to the world; 0 where none does."""
    stream = next((group for group in found.groups if group.kind == RESIDUAL), None)
    if stream is None:
        return 0.0
    key = max((moving.key(name) for name in stream.names), key=lambda k: (k.role == "embed", k.numel))
    rows = max(1, _LOOKED_AT // max(key.row_numel, 1))
    a, b = (source.read(key.name, 0, rows).double() for source in (moving, reference))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300))
