"""Models whose config.json ties the output layer to the embedding, and whose files store the pair in another way.

Both stored and equal: one tensor, listed once (random masks must not differ, and the result stays tied).  Only the
output layer stored: it is the embedding too, as transformers reads it.  Both stored and different: two tensors, as
transformers reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from weightsmith.core.keys import Key
from weightsmith.io.architectures import EMBEDDINGS
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.source import Source
from weightsmith.io.read.untied import says_tied, shares
from weightsmith.io.read.views import RenamedSource

__all__ = ["once"]

_PIECE = 1 << 24  # bytes compared at a time


def once(source: Source) -> Source:
    """The source itself, or a view of it in which a tied pair is one tensor under two names."""
    named = {key.name: key for key in source.keys.values() if len(key.shape) == 2 and key.role in ("embed", "head")}
    if len(named) < 2 and not any(key.role == "head" for key in named.values()):
        return source
    if not any(place.is_file() for place in source.origin.locations):  # comparing would fetch all of both
        return source
    modules = Modules(source)
    embeddings = [name for name in named if _module(name) in EMBEDDINGS]
    embeddings.sort(key=lambda name: _module(name) != "shared")
    twins: dict[str, str] = {}  # name -> the name that it is tied to
    if shares(modules.config):
        twins |= {name: embeddings[0] for name in embeddings[1:] if _equal(source, name, embeddings[0])}
    if says_tied(modules.config) and (head := _head(named, modules)) is not None:
        if not embeddings:
            name = _embedding_of(source)
            return source if name is None else RenamedSource(source, {name: head, **_plain(source, ())})
        same = next((name for name in embeddings if name not in twins and _equal(source, name, head)), None)
        twins |= {} if same is None else {head: same}
    return RenamedSource(source, {**_plain(source, twins), **twins}) if twins else source


def _plain(source: Source, without: Collection[str]) -> dict[str, str]:
    return {name: name for name in (*source.keys, *source.aliases) if name not in without}


def _module(name: str) -> str:
    """'embed_tokens' for 'model.embed_tokens.weight'."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _head(named: Mapping[str, Key], modules: Modules) -> str | None:
    """The stored output layer, which has the shape of an embedding where there is one."""
    heads = [key for key in named.values() if key.role == "head"]
    shapes = {key.shape for key in named.values() if key.role == "embed"}
    if not any(not shapes or key.shape in shapes for key in heads) or modules.output_layer is None:
        return None
    wanted = f"{modules.output_layer}.weight"
    return next((key.name for key in heads if key.name == wanted or key.name.endswith(f".{wanted}")), None)


def _embedding_of(source: Source) -> str | None:
    """What the embedding would be called in the files; None where that is not certain."""
    for stack, embedding in (("layers", "embed_tokens"), ("h", "wte")):  # Llama and its like, GPT-2
        blocks = {name.partition(f".{stack}.")[0] for name in source.keys if f".{stack}." in name}
        if blocks:
            return f"{blocks.pop()}.{embedding}.weight" if len(blocks) == 1 else None
    return None


def _equal(source: Source, one: str, other: str) -> bool:
    a, b = source.keys[one], source.keys[other]
    if (a.shape, a.dtype) != (b.shape, b.dtype) or source.computes(one) or source.computes(other):
        return False
    step = max(1, _PIECE * a.rows // max(a.nbytes, 1))
    ranges = ((low, min(low + step, a.rows)) for low in range(0, a.rows, step))
    return all(np.array_equal(source.bits(one, *rows), source.bits(other, *rows)) for rows in ranges)
