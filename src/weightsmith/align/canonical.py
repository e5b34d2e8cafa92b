"""Bring a model into the basis of a reference: undo permutations, and changes of basis by least squares.

A head whose values are B (V + delta) is told from a reference V by its row space, and B by least squares: from
V' = B V and O' = O B^-1 together, B minimises |V' - B V|^2 + |O' B - O|^2, whose normal equations are a Sylvester
equation.  Queries and keys likewise, where the matrix commutes with rotations in closed form for every pair.  The
smaller the change delta is, and the wider the model, the nearer the estimate (arXiv:2509.01548 has the symmetry; the
estimate is derived here).  Models that lie in one basis already come out nearly as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.align.bases import Attention, Branch, Hidden, Run, bases
from weightsmith.align.invariance import Known, Scheme
from weightsmith.align.match import match
from weightsmith.core.lazy import torch
from weightsmith.core.symmetry import identity, indices, permute
from weightsmith.core.turn import Turn
from weightsmith.io.read.aligned import ReorderedSource
from weightsmith.io.read.experts import laid_out_like, packed_like_memory
from weightsmith.io.read.source import Source
from weightsmith.io.read.turned import TurnedSource
from weightsmith.ops.assign import assigned

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Canonical", "canonical", "least_squares"]

_WIDTH = 512  # inputs that tell hidden units apart: of wide models the first ones are enough

State = Mapping[str, "Tensor"]


@dataclass(frozen=True, eq=False)
class Canonical:
    """A model in the basis of a reference.

    source     the view of it
    residuals  module -> branch -> |F' - A F| / |F'|: what the best change of basis does not explain of the locked side
    moved      module -> how many of its heads, or hidden units, stood elsewhere, of how many
    names      of the tensors of these modules
    """

    source: Source
    residuals: Mapping[str, Mapping[str, float]]
    moved: Mapping[str, tuple[int, int]]
    names: tuple[str, ...]


def canonical(moving: Source, reference: Source, known: Known) -> Canonical:
    """Estimate how `moving` was permuted and turned, and take it back.

    known  what may be turned in such a model (`invariance.known`).  One layer of both models is held at a time.
    """
    packed, other = packed_like_memory(moving), packed_like_memory(reference)
    found = bases(moving)
    orders: dict[str, np.ndarray] = {}
    turns: list[Turn] = []
    residuals: dict[str, dict[str, float]] = {}
    moved: dict[str, tuple[int, int]] = {}
    groups, names = [], list[str]()
    for one in found.all:
        kind = known.kind(one)
        if known.refusal(one) or any(n not in other.keys or other.key(n).shape != packed.key(n).shape
                                     for n in one.names):  # fmt: skip
            continue
        a, b = ({n: s.read(n).double() for n in one.names} for s in (packed, other))
        still = kind in known.still
        if isinstance(one, Attention):
            own, here, left = _attention(one, known.schemes[kind], a, b, still)
        else:
            own, here, left = _hidden(one, known.scaled[kind], a, b, still)
        names += one.names
        orders |= own
        turns += here
        groups.append(one.group)
        residuals[one.module] = left
        moved[one.module] = (int((own[one.group.name] != np.arange(one.group.size)).sum()), one.group.size)
    places = indices(groups, orders, {n: packed.key(n).shape for group in groups for n in group.names})
    told = {"towards": str(reference)}
    view = TurnedSource(ReorderedSource(packed, places), turns, told)
    return Canonical(laid_out_like(view, moving), residuals, moved, tuple(dict.fromkeys(names)))


# --- attention -------------------------------------------------------------------------------------


def _attention(
    one: Attention, schemes: Sequence[Scheme | None], a: State, b: State, still: bool
) -> tuple[dict[str, np.ndarray], list[Turn], dict[str, float]]:
    orders = identity(one.group) if still else _order(one, a, b)
    state = {**a, **permute(a, one.group, orders)}
    turns: list[Turn] = []
    left: dict[str, float] = {}
    first, second = (_blocks(one.vo, i, state) for i in (0, 1))
    base_first, base_second = (_blocks(one.vo, i, b) for i in (0, 1))
    matrices = np.stack([least_squares(*each) for each in zip(first, base_first, second, base_second, strict=True)])
    left["vo"] = _residual(first, base_first, matrices)
    turns += _undone(one.vo, matrices)
    for number, (branch, scheme) in enumerate(zip(one.qk, schemes, strict=True)):
        if scheme is None:
            continue
        sides = (_blocks(branch, 0, state), _blocks(branch, 0, b), _blocks(branch, 1, state), _blocks(branch, 1, b))
        free = _turning(branch, scheme, a)
        found = np.stack([_commuting(branch, scheme, free, *each) for each in zip(*sides, strict=True)])
        name = "qk" if len(one.qk) == 1 else f"qk{number}"
        left[name] = _residual(sides[0], sides[1], found)
        turns += _undone(branch, found)
        if branch.normed:
            turns += _gains(branch, scheme, state, b)
    return orders, turns, left


def _blocks(branch: Branch, side: int, state: State) -> np.ndarray:
    """One side of a branch: [matrices, width, all that each acts on] float64; biases are left out."""
    found = []
    for run in (branch.first, branch.second)[side]:
        tensor = state[run.name]
        if tensor.ndim == 2:
            found.append(_units(tensor, run, branch.count))
    return np.concatenate(found, axis=-1)


def _units(tensor: Tensor, run: Run, count: int) -> np.ndarray:
    """The blocks of a run, those of one matrix side by side: [count, width, times * other axis]."""
    flat = tensor.movedim(run.axis, 0)
    units = flat[run.start :].unfold(0, run.width, run.every)[: count * run.times]  # [units, other, width]
    grouped = units.reshape(count, run.times, -1, run.width).permute(0, 3, 1, 2)
    return np.asarray(grouped.reshape(count, run.width, -1).numpy())


def _order(one: Attention, a: State, b: State) -> dict[str, np.ndarray]:
    """Which key-value head stands where, by the row spaces of values, and query heads in them by their outputs."""
    orders = identity(one.group)
    spaces = [_spaces(_blocks(one.vo, 0, state)) for state in (b, a)]
    profit = np.einsum("iwc,jvc->ijwv", *spaces, optimize=True)
    order = orders[one.group.name] = assigned((profit**2).sum((-1, -2)))
    for small in one.group.inside:
        runs = [run for run in one.vo.second if run.times == small.size and a[run.name].ndim == 2]
        if not runs:
            continue
        run = runs[0]
        heads = []
        for state in (b, a):
            found = _units(state[run.name], run, one.vo.count)
            heads.append(found.reshape(*found.shape[:2], small.size, -1).swapaxes(1, 2))  # [count, times, width, other]
        inner = orders[one.group.inner(small)]
        for place, j in enumerate(order):
            near = np.einsum("iwc,jvc->ijwv", _spaces(heads[0][place]), _spaces(heads[1][j]), optimize=True)
            inner[place] = assigned((near**2).sum((-1, -2)))
    return orders


def _spaces(blocks: np.ndarray) -> np.ndarray:
    """Orthonormal rows that span the same: [n, width, columns]."""
    return np.asarray(np.linalg.qr(blocks.swapaxes(1, 2)).Q.swapaxes(1, 2))


def least_squares(first: np.ndarray, f: np.ndarray, second: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The matrix A with the smallest |F' - A F|^2 + |A^T S' - S|^2: all [width, columns], A [width, width].

    A (F F^T) + (S' S'^T) A = F' F^T + S' S^T, solved in the eigenvectors of both Gram matrices.
    """
    right = first @ f.T + second @ s.T
    m, v = np.linalg.eigh(f @ f.T)
    n, u = np.linalg.eigh(second @ second.T)
    below = n[:, None] + m[None, :]
    below = np.maximum(below, 1e-12 * max(float(below.max(initial=0)), 1e-300))
    return np.asarray(u @ ((u.T @ right @ v) / below) @ v.T)


def _turning(branch: Branch, scheme: Scheme, a: State) -> list[bool]:
    """Which pairs may have been turned by any angle: behind a norm those of equal gains; the others were flipped."""
    gains = [a[run.name] for runs in branch.gains for run in runs]
    any_angle = not branch.normed or (branch.shared and bool(gains))
    return [any_angle and all(bool(g[x] == g[y]) for g in gains) for x, y in scheme.commutant(branch).pairs]


def _commuting(
    branch: Branch,
    scheme: Scheme,
    turning: Sequence[bool],
    first: np.ndarray,
    f: np.ndarray,
    second: np.ndarray,
    s: np.ndarray,
) -> np.ndarray:
    """The same for one head's queries and keys, among the matrices that its scheme allows."""
    if scheme.norm == "gains":
        return np.eye(branch.width)
    allowed = scheme.commutant(branch)
    found = np.zeros((branch.width, branch.width))
    free = list(allowed.free)
    if branch.normed:
        signs = np.sign(np.einsum("ic,ic->i", first[free], f[free]) + np.einsum("ic,ic->i", second[free], s[free]))
        found[free, free] = np.where(signs == 0, 1.0, signs)
    elif free:
        found[np.ix_(free, free)] = least_squares(first[free], f[free], second[free], s[free])
    for (x, y), any_angle in zip(allowed.pairs, turning, strict=True):
        turned, still, other, base = (side[x] + 1j * side[y] for side in (first, f, second, s))
        weight = np.vdot(still, still).real + np.vdot(other, other).real
        number = (np.vdot(still, turned) + np.vdot(base, other)) / max(weight, 1e-300)
        if branch.normed:
            number /= max(abs(number), 1e-300)
        if not any_angle:
            number = 1.0 if number.real >= 0 else -1.0
        found[np.ix_((x, y), (x, y))] = [[number.real, -number.imag], [number.imag, number.real]]
    if np.linalg.matrix_rank(found) < branch.width:  # nothing there to tell: heads of zeros
        return np.eye(branch.width)
    return found


def _undone(branch: Branch, matrices: np.ndarray) -> list[Turn]:
    """A^-1 on the first side, A^T on the second."""
    regular = np.stack([m if np.linalg.cond(m) < 1e8 else np.eye(len(m)) for m in matrices])
    back = np.linalg.inv(regular)
    return [
        *(run.turn(back) for run in branch.first),
        *(run.turn(regular.transpose(0, 2, 1)) for run in branch.second),
    ]


def _gains(branch: Branch, scheme: Scheme, a: State, b: State) -> list[Turn]:
    """What gains were multiplied by: one number for both entries of a pair, and for queries and keys."""
    allowed = scheme.commutant(branch)
    logs = []
    for side, runs in enumerate(branch.gains):
        for run in runs:
            if run.name.endswith("weight"):
                ratio = (a[run.name] + run.plus).abs().clamp(min=1e-12) / (b[run.name] + run.plus).abs().clamp(
                    min=1e-12
                )
                mean = np.log(ratio.numpy()).reshape(-1 if run.times else 1, max(run.times, 1), branch.width).mean(1)
                logs.append(mean if side == 0 else -mean)
    if not logs:
        return []
    r = np.mean(logs, axis=0)
    for x, y in allowed.pairs:
        r[:, [x, y]] = r[:, [x, y]].mean(1, keepdims=True)
    sides = (np.exp(-r), np.exp(r))
    turns = []
    for runs, values in zip(branch.gains, sides, strict=True):
        turns += [run.turn(values) if run.times else Turn(run.name, 0, 0, values[0], 0, run.plus) for run in runs]
    return turns


def _residual(first: np.ndarray, f: np.ndarray, matrices: np.ndarray) -> float:
    return float(np.linalg.norm(first - matrices @ f) / max(float(np.linalg.norm(first)), 1e-300))


# --- MLPs ------------------------------------------------------------------------------------------


def _hidden(
    one: Hidden, scaled: tuple[int, bool] | None, a: State, b: State, still: bool
) -> tuple[dict[str, np.ndarray], list[Turn], dict[str, float]]:
    """Hidden units by the directions of what they read and write, then their scales."""
    if still and scaled is None:
        return identity(one.group), [], {}
    if one.group.inside or not one.down:
        return dict(match([one.group], b, a).orders), [], {}
    size = one.group.size
    ups = {run.name for runs in one.ups for run in runs}
    profit = np.zeros((size, size))
    for axis in one.group.axes:
        if a[axis.name].ndim != 2:
            continue
        for part in range(axis.outer):
            start = axis.start + part * size
            near = (
                _directions(b[axis.name], axis.axis, start, size) @ _directions(a[axis.name], axis.axis, start, size).T
            )
            # a unit whose scale is negative points the other way, in both of its sides
            mixed = axis.name in ups or axis.name in {run.name for run in one.down}
            profit += (near.abs() if mixed and scaled is not None and scaled[1] else near).double().numpy()
    order = np.arange(size) if still else assigned(profit)
    turns: list[Turn] = []
    if scaled is not None:
        now = {**a, **permute(a, one.group, {one.group.name: order})}
        up, down = one.ups[scaled[0]], one.down
        (u, u0), (d, d0) = (tuple(_rows(runs, state, size) for state in (now, b)) for runs in (up, down))
        s = ((u * u0).sum(1) + (d * d0).sum(1)) / ((u0 * u0).sum(1) + (d * d).sum(1)).clip(1e-300)
        s = np.where(np.abs(s) < 1e-8, 1.0, s)
        turns = [Turn(r.name, r.axis, r.start, 1 / s) for r in up] + [Turn(r.name, r.axis, r.start, s) for r in down]
    return {one.group.name: order}, turns, {}


def _directions(tensor: Tensor, axis: int, start: int, size: int) -> Tensor:
    """Units of one axis as rows of length 1, of their first inputs: [size, <= 512] float32."""
    rows = tensor.movedim(axis, 0)[start : start + size, :_WIDTH].float()
    return torch.nn.functional.normalize(rows, dim=1)


def _rows(runs: Sequence[Run], state: State, size: int) -> np.ndarray:
    found = [state[r.name].movedim(r.axis, 0)[r.start : r.start + size].reshape(size, -1).numpy() for r in runs]
    return np.concatenate(found, axis=1)
