"""Rows for tokens that a model lacks, from the rows that another model (the donor) has for them.

Anchors are the tokens that both have: [n, d] in the donor's space, [n, e] in the model's.  Every function takes
targets [b, d] in the donor's space and gives rows [b, e] in the model's, in float32 or better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.lazy import torch
from weightsmith.ops.pursuit import omp

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Affine", "Rope", "basis", "carried", "interpolate", "landmarks", "pursue_with_rope"]

_TINY = 1e-8


def interpolate(targets: Tensor, anchors: Tensor, k: int, metric: str, weights: str) -> tuple[Tensor, Tensor]:
    """The k nearest anchors of each target and their weights: (indices, weights) [b, k], in float64.

    metric   euclidean or cosine
    weights  distance_proportional (1 / distance, or the cosine), barycentric (least squares with sum 1) or
             least_squares
    """
    targets, anchors = targets.double(), anchors.double()
    if metric == "cosine":
        lengths = targets.norm(dim=1).unsqueeze(1) * anchors.norm(dim=1)
        far = 1 - (targets @ anchors.T) / lengths.clamp(min=1e-12)
    else:
        far = torch.cdist(targets, anchors)
    near, indices = far.topk(k, dim=1, largest=False)
    if weights == "distance_proportional":
        found = (1 - near).clamp(min=0) if metric == "cosine" else 1 / near.clamp(min=1e-6)
        return indices, found / found.sum(dim=1, keepdim=True).clamp(min=1e-12)
    points = anchors[indices]
    if weights == "least_squares":
        return indices, _least_squares(points.transpose(1, 2), targets)
    # With the last anchor as origin the weights of the others are free, and the last one's makes the sum 1.
    origin = points[:, -1:]
    free = _least_squares((points[:, :-1] - origin).transpose(1, 2), targets - origin.squeeze(1))
    return indices, torch.cat([free, 1 - free.sum(dim=1, keepdim=True)], dim=1)


@dataclass(frozen=True)
class Affine:
    """Rows [b, d] -> (rows - here) @ turn [d, e] + there, in float64."""

    here: Tensor
    turn: Tensor
    there: Tensor

    def __call__(self, targets: Tensor) -> Tensor:
        return (targets.double() - self.here) @ self.turn + self.there


def landmarks(anchors: Tensor, ours: Tensor) -> Affine:
    """The rotation between the spaces that takes the anchors nearest to ours (orthogonal Procrustes, centred).

    Where one space is wider, only the directions in which its anchors vary most take part.
    """
    anchors, ours = anchors.double(), ours.double()
    here, there = anchors.mean(dim=0), ours.mean(dim=0)
    size = min(anchors.shape[1], ours.shape[1])
    left, right = _leading(anchors - here, size), _leading(ours - there, size)
    cross = ((anchors - here) @ left).T @ ((ours - there) @ right)
    u, _, v = torch.linalg.svd(cross)
    return Affine(here, left @ (u @ v) @ right.T, there)


def basis(anchors: Tensor, ours: Tensor, k: int) -> Affine:
    """Sparse token basis: principal directions as sums of k anchors carry each target's coordinates over.

    The directions are those of the narrower space; each is written with k anchors (`omp`), and the same anchors with
    the same coefficients stand for it in both spaces.
    """
    here, there = anchors.mean(dim=0), ours.mean(dim=0)
    theirs, mine = anchors - here, ours - there
    narrow = theirs if theirs.shape[1] < mine.shape[1] else mine
    directions = _leading(narrow.double(), narrow.shape[1]).T.to(narrow.dtype)
    indices, coefficients = omp(directions, narrow, k)
    source, goal = (carried(coefficients, indices, space).double() for space in (theirs, mine))
    # Coordinates by least squares: the smallest where several fit.
    return Affine(here.double(), torch.linalg.pinv(source) @ goal, there.double())


def carried(coefficients: Tensor, indices: Tensor, ours: Tensor) -> Tensor:
    """Sums of anchors: [b, k] with [n, e] -> [b, e], in the coefficients' dtype."""
    found = []
    for low in range(0, len(indices), 64):  # what is gathered is k times as large as what comes out
        share, own = coefficients[low : low + 64], indices[low : low + 64]
        found.append((share.unsqueeze(1) @ ours[own].to(share.dtype)).squeeze(1))
    return torch.cat(found)


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a model: attention heads and the base of the frequencies."""

    heads: int
    base: float

    def turned(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Rows [..., heads * size] as RoPE turns them at real-valued positions [...]."""
        first, second = self._halves(rows)
        angle = positions[..., None, None] * self._frequencies(rows)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).reshape(rows.shape)

    def position(self, rows: Tensor, goal: Tensor) -> Tensor:
        """The positions [...] whose angles are nearest (least squares) to those from `rows` to `goal`."""
        (a, b), (c, d) = self._halves(rows), self._halves(goal)
        angle = torch.atan2(a * d - b * c, a * c + b * d)
        frequencies = self._frequencies(rows)
        return (angle * frequencies).sum(dim=(-1, -2)) / (self.heads * frequencies.square().sum())

    def _halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        first, second = rows.reshape(*rows.shape[:-1], self.heads, -1).chunk(2, dim=-1)
        return first, second

    def _frequencies(self, rows: Tensor) -> Tensor:
        size = rows.shape[-1] // self.heads
        return self.base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size).to(rows.dtype)


def pursue_with_rope(targets: Tensor, anchors: Tensor, ours: Tensor, k: int, theirs: Rope, mine: Rope) -> Tensor:
    """Matching pursuit in which every taken anchor is turned, as by a position, to fit what is left.

    The coefficients are fitted anew at the end; in the model's space the anchors are turned by the same positions.
    """
    left = targets
    taken = torch.zeros(len(targets), k, dtype=torch.long)
    places = targets.new_zeros(len(targets), k)
    free = torch.ones(len(targets), len(anchors), dtype=torch.bool)
    each = torch.arange(len(targets))
    for t in range(k):
        chosen = (left @ anchors.T).abs().masked_fill_(~free, -1.0).argmax(dim=1)
        free[each, chosen] = False
        atom = anchors[chosen]
        ahead, behind = theirs.position(atom, left), theirs.position(atom, -left)
        taken[:, t], places[:, t] = chosen, torch.where(ahead.abs() < behind.abs(), ahead, behind)
        atom = theirs.turned(atom, places[:, t])
        share = (left * atom).sum(dim=1) / atom.square().sum(dim=1).clamp(min=_TINY)
        left = left - share.unsqueeze(1) * atom
    turned = theirs.turned(anchors[taken], places).double()
    coefficients = _least_squares(turned.transpose(1, 2), targets.double())
    return (coefficients.unsqueeze(2) * mine.turned(ours[taken], places).double()).sum(dim=1)


def _leading(rows: Tensor, count: int) -> Tensor:
    """The directions [d, count] in which centred rows vary most, the first foremost."""
    found: Tensor = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :count]
    return found


def _least_squares(columns: Tensor, goals: Tensor) -> Tensor:
    """x [b, k] with columns [b, d, k] @ x nearest to goals [b, d]; the smallest where several are."""
    found: Tensor = torch.linalg.lstsq(columns, goals.unsqueeze(2), driver="gelsd").solution.squeeze(2)
    return found
