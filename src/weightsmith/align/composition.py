"""How heads talk to later heads: composition scores of whole heads and of single components (arXiv:2406.09519).

Written from the published method; the authors' code was not at hand.  OV = W_V W_O of an earlier head is
sum_c s_c u_c v_c^T; component c writes along v_c.  Its score with a later head is ||v_c^T M|| / ||M||, M being what
that head does with what it reads: QK (its queries), QK^T (its keys) or OV (its values).  Matrices of the width of the
residual stream on both sides are never made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from weightsmith.align.heads import Heads, Rotation, heads_of, places, rotation
from weightsmith.align.parts import Model
from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.core.lazy import torch
from weightsmith.io.read.source import Source
from weightsmith.report.figures import BOTH, Heat
from weightsmith.report.html import page
from weightsmith.report.table import Column, Table

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Channel", "Composition", "Kind", "as_page", "baseline", "components", "composition", "reads"]

Kind = Literal["q", "k", "v"]
"""Which input of the later head reads."""
_TOP = 100  # channels kept


@dataclass(frozen=True)
class Channel:
    """A component of an earlier head and a later head.

    score  above the baseline;  z  in standard deviations, over all earlier components for that later head
    """

    layer: int
    head: int
    component: int
    to_layer: int
    to_head: int
    score: float
    z: float


@dataclass(frozen=True, eq=False)
class Composition:
    """Scores of all pairs of an earlier and a later head.

    names     'layer.head' of all heads, in order
    matrix    [heads, heads]: row writes, column reads; NaN where the row is not in an earlier layer; of whole heads
    channels  the components with the largest z, largest first
    baseline  what random directions score, subtracted from all of these
    """

    names: tuple[str, ...]
    matrix: Tensor
    channels: tuple[Channel, ...]
    baseline: float


def components(heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """u [heads, width, c], s [heads, c] and v [heads, c, width] with W_V W_O = u diag(s) v, by thin factorisations.

    Singular vectors have no sign of their own, and those of equal values none at all.
    """
    qv, rv = torch.linalg.qr(heads.v.mT)
    qo, ro = torch.linalg.qr(heads.o.mT)
    left, s, right = torch.linalg.svd(rv @ ro.mT)
    return qv @ left, s, (qo @ right.mT).mT


def reads(heads: Heads, kind: Kind, turn: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a later head reads with [heads, width, entries], and how it weighs that: Grams [heads, entries, entries].

    ||x M||^2 = (x left) gram (x left)^T.  turn: R of rotary position embeddings at one distance, see `Rotation`.
    """
    if kind == "v":
        return heads.v.mT, heads.o @ heads.o.mT
    q, k = (heads.q, heads.k) if turn is None else (turn.mT @ heads.q, heads.k)
    left, other = (q, k) if kind == "q" else (k, q)
    return left.mT, other @ other.mT


def baseline(width: int, centred: bool) -> float:
    """Root of the mean squared score of a random direction: 1 / sqrt(width), of one less where means are taken away."""
    return float((width - centred) ** -0.5)


def composition(
    source: Source,
    kind: Kind = "q",
    *,
    fold: bool = True,
    subtract: bool = True,
    targets: Sequence[tuple[int, int]] | None = None,
    distances: Sequence[float] = (0,),
) -> Composition:
    """Scores of a decoder's heads from its weights alone.

    fold       norms are folded into what reads, and writing is centred, see `align.heads`
    subtract   the score of random directions
    targets    (layer, head) of later heads; None: all
    distances  of query and key in tokens, for rotary position embeddings: scores are means over them
    Raises SourceError for models whose heads cannot be read, or norms of queries and keys (kinds q and k).
    """
    model = Model(source)
    found = places(model)
    if kind != "v" and any(t.part == "qk_norm" for t in model.tensors):
        raise SourceError(f"{source}: norms of queries and keys stand between their matrices; kind v has none of them")
    turns = _turns(rotation(model, found[0].shape.query) if kind != "v" else None, found[0].shape.query, distances)
    index = {(place.layer, head): n for n, (place, head) in enumerate((p, h) for p in found for h in range(p.count))}
    _refuse_unknown(targets, index)
    matrix = torch.full((len(index), len(index)), torch.nan, dtype=torch.float64)
    channels: list[Channel] = []
    written: list[tuple[Tensor, Tensor]] = []  # s and v of the heads of earlier layers
    below, width = 0.0, 0
    for place in found:
        heads = heads_of(model, place, fold)
        width = heads.o.shape[-1]
        below = baseline(width, fold and _centred(heads)) if subtract else 0.0
        if written:
            s, v = (torch.cat([layer[i] for layer in written]) for i in (0, 1))
            for head, scores in _scores(heads, kind, turns, v):
                if targets is None or (place.layer, head) in targets:
                    whole = ((s * scores).square().sum(1) / s.square().sum(1).clamp(min=1e-300)).sqrt()
                    matrix[: len(whole), index[place.layer, head]] = whole - below
                    channels = _largest([*channels, *_channels(scores - below, list(index), (place.layer, head))])
        _, s, v = components(heads)
        written.append((s, v))
    return Composition(tuple(f"{layer}.{head}" for layer, head in index), matrix, tuple(channels), below)


def _scores(heads: Heads, kind: Kind, turns: Sequence[Tensor | None], v: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(head, scores [earlier heads, components]) of every head of a layer; v: [earlier heads, components, width]."""
    for head in range(len(heads.q)):
        one = Heads(heads.layer, *(t[head : head + 1] for t in (heads.q, heads.k, heads.v, heads.o)))
        total = torch.zeros(v.shape[:2], dtype=v.dtype)
        for turn in turns:
            left, gram = reads(one, kind, turn)
            read = v @ left[0]
            size = (left[0].T @ left[0] * gram[0].T).sum().clamp(min=1e-300).sqrt()
            total += ((read @ gram[0]) * read).sum(-1).clamp(min=0).sqrt() / size
        yield head, total / len(turns)


def _channels(scores: Tensor, names: Sequence[tuple[int, int]], to: tuple[int, int]) -> list[Channel]:
    spread = float(scores.std()) or 1.0
    mean = float(scores.mean())
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)[:_TOP].tolist()
    width = scores.shape[1]
    found = []
    for i in order:
        (layer, head), component, score = names[i // width], i % width, float(flat[i])
        found.append(Channel(layer, head, component, to[0], to[1], score, (score - mean) / spread))
    return found


def _largest(channels: list[Channel]) -> list[Channel]:
    return sorted(channels, key=lambda c: -c.z)[:_TOP]


def _turns(rotated: Rotation | None, width: int, distances: Sequence[float]) -> list[Tensor | None]:
    if rotated is None:
        return [None]
    if not distances:
        raise RecipeError("give at least one distance")
    return [rotated.matrix(width, distance) for distance in distances]


def _centred(heads: Heads) -> bool:
    return bool(heads.o.mean(-1).abs().max() <= 1e-12 * heads.o.abs().max())


def _refuse_unknown(targets: Sequence[tuple[int, int]] | None, known: dict[tuple[int, int], int]) -> None:
    for layer, head in targets or ():
        if (layer, head) not in known:
            last = max(known)
            raise RecipeError(f"no head {layer}.{head}; the last one is {last[0]}.{last[1]}")


def as_page(title: str, found: Composition) -> str:
    """The scores of all pairs of heads, and the largest channels, as an HTML page."""
    values = [[None if row != row else row for row in line] for line in found.matrix.tolist()]
    texts = [["" for _ in line] for line in values]
    about = [
        ["" if v is None else f"{w} to {r}: {v:.3f}" for r, v in zip(found.names, line, strict=True)]
        for w, line in zip(found.names, values, strict=True)
    ]
    known = [v for line in values for v in line if v is not None]
    reach = max((abs(v) for v in known), default=1.0) or 1.0
    note = f"Above {found.baseline:.3f}, what random directions score.  Rows write, columns read."
    heat = Heat("Whole heads", found.names, found.names, values, texts, BOTH, (-reach, reach), "score", note, about)
    columns = (
        Column("writes", "Component"),
        Column("reads", "Head"),
        Column("score", "Score", 3),
        Column("z", "z", 1),
    )
    rows = [
        {
            "writes": f"{c.layer}.{c.head}.{c.component}",
            "reads": f"{c.to_layer}.{c.to_head}",
            "score": c.score,
            "z": c.z,
        }
        for c in found.channels
    ]
    return page(f"Channels between the heads of {title}", [Table("Largest channels", columns, rows), heat])
