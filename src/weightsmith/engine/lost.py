"""How far the models of a compressed folder are from those that went in, measured while they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Codec
from weightsmith.core.site import Site
from weightsmith.core.task import Task
from weightsmith.ops.reduce import block_squares

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Squares", "added", "errors", "squares_lost"]

Squares = Mapping[str, tuple[float, float]]
"""Expert -> squared Frobenius norms: of what is lost, and of what there was."""


def squares_lost(task: Task, codec: Codec, site: Site, stored: Mapping[str, Tensor]) -> Squares:
    """Of one block: |x' - x|^2 and |x|^2 per expert, float64.

    x is the task vector, or the weight itself where there is no base; x' is decoded from `stored` (part's full name ->
    the rows that stand for the block, as they are written).  So 1 is what is lost by storing nothing.
    """
    like = site.base if site.base is not None else site.stack[0]
    zeros = torch.zeros(site.block_shape, dtype=like.dtype, device=like.device)
    of_changes = BASE in codec.traits.needs
    found = {}
    for expert, change, whole in zip(site.names, _changes(site), _wholes(site, of_changes), strict=True):
        own = {p.name: stored[p.key.name] for p in task.encoded if p.expert in ("", expert)}
        parts = {name: t.to(like.dtype) if t.is_floating_point() else t for name, t in own.items()}
        missed = codec.decode(parts, zeros, site.offset) - (change if whole is None else whole)
        found[expert] = (_square(missed), _square(change))
    return found


def added(found: Iterable[Squares]) -> Squares:
    """The squares of several blocks together."""
    total: dict[str, tuple[float, float]] = {}
    for squares in found:
        for expert, (missed, there) in squares.items():
            before = total.get(expert, (0.0, 0.0))
            total[expert] = before[0] + missed, before[1] + there
    return total


def errors(lost: Mapping[str, Squares]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Relative errors |x' - x| / |x| from tensor -> squares: expert -> of all, and tensor -> expert -> of it."""
    experts = list(dict.fromkeys(expert for squares in lost.values() for expert in squares))
    total = {e: _share(squares[e] for squares in lost.values()) for e in experts}
    return total, {name: {e: _share([pair]) for e, pair in squares.items()} for name, squares in lost.items()}


def _changes(site: Site) -> Iterable[Tensor]:
    """What each expert has beyond the base, one at a time where they are read so; all of it where there is no base."""
    if site.factors:
        return (left @ right for left, right in site.factors)
    return site.tasks if site.base is not None or site.is_delta else site.stack.unbind()


def _wholes(site: Site, of_changes: bool) -> Iterable[Tensor | None]:
    """The experts' weights, for codecs that store those; else None."""
    return (None,) * len(site.names) if of_changes or site.base is None else site.experts.unbind()


def _square(tensor: Tensor) -> float:
    return float(block_squares(tensor))


def _share(pairs: Iterable[Any]) -> float:
    """Four digits; where there was nothing 0, or 1 if something is there now."""
    missed, there = map(math.fsum, zip(*pairs, strict=True))
    return float(f"{math.sqrt(missed / there):.4g}") if there else float(missed > 0)
