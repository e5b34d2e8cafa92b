"""How far the models of a compressed folder are from those that went in, measured while they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Codec
from weightsmith.core.site import Site
from weightsmith.core.task import Task
from weightsmith.ops.reduce import block_squares

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Squares", "errors", "squares_lost"]

Squares = Mapping[str, tuple[float, float]]
"""Expert -> squared Frobenius norms: of what is lost, and of what there was."""


def squares_lost(task: Task, codec: Codec, site: Site, stored: Mapping[str, Tensor]) -> Squares:
    """Of one whole tensor: |x' - x|^2 and |x|^2 per expert, float64.

    x is the task vector, or the weight itself where the codec needs no base; x' is decoded from `stored` (part's full
    name -> tensor as it is written).  One expert at a time.
    """
    like = site.base if site.base is not None else site.stack[0]
    zeros = torch.zeros(site.block_shape, dtype=like.dtype, device=like.device)
    found = {}
    for expert, wanted in zip(site.names, _wanted(site, codec), strict=True):
        own = {p.name: stored[p.key.name] for p in task.encoded if p.expert in ("", expert)}
        parts = {name: t.to(like.dtype) if t.is_floating_point() else t for name, t in own.items()}
        missed = codec.decode(parts, zeros, 0) - wanted
        found[expert] = (_square(missed), _square(wanted))
    return found


def errors(lost: Mapping[str, Squares]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Relative errors |x' - x| / |x| from tensor -> squares: expert -> of all, and tensor -> expert -> of it."""
    experts = list(dict.fromkeys(expert for squares in lost.values() for expert in squares))
    total = {e: _share(squares[e] for squares in lost.values()) for e in experts}
    return total, {name: {e: _share([pair]) for e, pair in squares.items()} for name, squares in lost.items()}


def _wanted(site: Site, codec: Codec) -> Iterator[Tensor]:
    if BASE not in codec.traits.needs:
        yield from site.experts
    elif site.factors:
        yield from (left @ right for left, right in site.factors)
    else:
        yield from site.tasks


def _square(tensor: Tensor) -> float:
    return float(block_squares(tensor))


def _share(pairs: Iterable[Any]) -> float:
    """Four digits; 0 where there is nothing to lose."""
    missed, there = map(math.fsum, zip(*pairs, strict=True))
    return float(f"{math.sqrt(missed / there):.4g}") if there else 0.0
