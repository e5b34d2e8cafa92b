"""Least squares for a partial merge of whole transformers: every matrix of a block, from streamed sums (PLeaS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weightsmith.align.data import Pair, activations
from weightsmith.align.leastsquares import Normal
from weightsmith.align.partial import Split
from weightsmith.align.parts import Model
from weightsmith.align.parts import Tensor as Part
from weightsmith.core.keys import layer_of
from weightsmith.core.symmetry import Orders, SymmetryGroup, indices
from weightsmith.io.read.source import Source
from weightsmith.observe.data import batches

__all__ = ["Fitted", "fitted"]

_HELD = 4 << 30  # bytes of sums that are held at once; more take more passes over the data
_PARTS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")


@dataclass(frozen=True, eq=False)
class Fitted:
    """Tensors of the wider model that least squares give, as they are stored, float32.

    short   layers whose inputs had not full rank: name -> (rank, inputs); a ridge decides what the data do not
    losses  layer -> mean squared error per token of the weights alone, and fitted
    """

    tensors: Mapping[str, Tensor]
    short: Mapping[str, tuple[int, int]]
    losses: Mapping[str, tuple[float, float]]


def fitted(
    source: Source,
    start: Mapping[str, Tensor],
    orders: Orders,
    groups: Sequence[SymmetryGroup],
    splits: Mapping[str, Split],
    pair: Pair,
) -> Fitted:
    """Fit the matrices of all blocks to what both original models' layers do on data.

    source  either model, for its layout;  start: tensors of the merge by weights alone, by name
    orders, groups  the permutation of the moving model;  splits: of the groups that become wider
    """
    model = Model(source)
    parts = {t.key.name: t for t in model.tensors if t.part in _PARTS and layer_of(t.key.name) and not t.packed}
    matrices = [t for t in parts.values() if t.into is not None]
    shapes = {name: key.shape for name, key in source.keys.items()}
    plain = [group for group in groups if group.name not in splits]
    places = indices(plain, orders, shapes)
    wide = {(a.name, a.axis): (splits[g.name], a.outer) for g in groups if g.name in splits for a in g.axes}

    def side(part: Part, axis: int) -> tuple[Split | None, int]:
        if found := wide.get((part.key.name, axis)):
            return _repeated(*found), found[1]
        index = places.get(part.key.name, {}).get(axis)
        if index is None or index.ndim > 1:
            return None, 1
        return Split(np.stack([np.arange(len(index)), index]), np.empty((2, 0), np.int64)), 1

    tensors: dict[str, Tensor] = {}
    short: dict[str, tuple[int, int]] = {}
    losses: dict[str, tuple[float, float]] = {}
    left = list(matrices)
    while left:
        chosen: list[tuple[Part, Normal, int]] = []
        size = 0
        while left and (not chosen or size + _bytes(left[0], start) <= _HELD):
            part = left.pop(0)
            assert part.into is not None
            rows, outer = side(part, part.out)
            chosen.append((part, Normal(rows, side(part, part.into)[0]), outer))
            size += _bytes(part, start)
        _add(pair, chosen)
        for part, sums, outer in chosen:
            name = part.key.name
            bias = parts.get(f"{name.removesuffix('weight')}bias")
            fit = sums.solve(bias=bias is not None)
            order = _stored(fit.weight.shape[0], sums.rows, outer)
            old = start[name].double() if part.out == 0 else start[name].double().T
            before = None if bias is None else start[bias.key.name].double()[order.argsort()]
            losses[name] = sums.loss(old[order.argsort()], before), sums.loss(fit.weight, fit.bias)
            weight = fit.weight[order].float()
            tensors[name] = (weight if part.out == 0 else weight.T).contiguous()
            if bias is not None:
                tensors[bias.key.name] = fit.bias[order].float()
            if fit.rank is not None:
                short[name] = fit.rank, fit.weight.shape[1]
    return Fitted(tensors, short, losses)


def _bytes(part: Part, start: Mapping[str, Tensor]) -> int:
    shape = start[part.key.name].shape
    assert part.into is not None
    return 8 * (shape[part.into] + 1) * (shape[part.into] + 1 + shape[part.out])


def _repeated(split: Split, outer: int) -> Split:
    """The split of all entries of an axis that has the units `outer` times."""
    size = split.merged.shape[1] + split.separate.shape[1]
    both = [
        np.concatenate([side + i * size for i in range(outer)], axis=1) for side in (split.merged, split.separate)
    ]  # fmt: skip
    return Split(both[0], both[1])


def _stored(width: int, rows: Split | None, outer: int) -> Tensor:
    """Where each row of the stored tensor lies in the layout of `rows`: [merged | of one | of the other], repeated.

    A fused gate_up stores [merged | of one | of the other] of its first half, then of its second.
    """
    if rows is None or outer == 1:
        return torch.arange(width)
    k, m = rows.merged.shape[1] // outer, rows.separate.shape[1] // outer
    starts = (0, outer * k, outer * (k + m))
    sides = [*zip(starts, (k, m, m), strict=True)]
    return torch.cat([torch.arange(count) + start + i * count for i in range(outer) for start, count in sides])


def _add(pair: Pair, chosen: Sequence[tuple[Part, Normal, int]]) -> None:
    names = [part.key.name for part, _, _ in chosen]
    wanted = [(name, side) for name in names for side in ("in", "out")]
    layers = pair.layers()
    for batch in batches(pair.examples, pair.batch):
        first, second = (
            activations(loaded, own, wanted, batch)
            for loaded, own in zip((pair.reference, pair.moving), layers, strict=True)
        )
        for name, (_, sums, _) in zip(names, chosen, strict=True):
            sums.add((first[name, "in"], second[name, "in"]), (first[name, "out"], second[name, "out"]))
