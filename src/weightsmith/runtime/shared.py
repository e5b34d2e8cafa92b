"""What several layers' states share: a low-rank basis (xKV), or one direction per token (MiniCache).

Sources: Chang et al., arXiv:2503.18893 (xKV); Liu et al., arXiv:2405.14366 (MiniCache), in the form that xKV's public
code gives it.  States are [batch, tokens, D] with the heads side by side, D = heads * width; a row of zeros is padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.core.errors import NumericError
from weightsmith.ops.leading import eigh
from weightsmith.ops.lowrank import rank_for

__all__ = ["TILE", "LowRank", "Rule", "Shared", "Slerp"]

TILE = 1024
"""Tokens that are rebuilt at a time: a tile of keys stays in the processor's cache."""

_SLAB = 4096  # tokens of which a Gram matrix is added up at a time


@dataclass(frozen=True)
class Rule:
    """How many directions to keep: `rank`, or the fewest that hold the share `energy` of the squared singular values.

    Both None: nothing is compressed.  always: also where that saves nothing, as at full rank.
    """

    rank: int | None = None
    energy: float | None = None
    always: bool = False

    @property
    def idle(self) -> bool:
        return self.rank is None and self.energy is None


class Shared(ABC):
    """The compressed tokens of a group of layers; immutable."""

    tokens: int

    @abstractmethod
    def rows(self, layer: int, low: int, high: int) -> Tensor:
        """Tokens low .. high of a layer (its place in the group), rebuilt: [batch, high - low, D]."""

    @abstractmethod
    def weighted(self, layer: int, weights: Tensor, heads: int) -> Tensor:
        """Sums of the layer's tokens: weights [batch, heads, queries, tokens] -> [batch, heads, queries, D / heads]."""

    @abstractmethod
    def grown(self, layers: Sequence[Tensor], rule: Rule) -> Shared | None:
        """The same with more tokens, [batch, new, D] of every layer; None where that saves nothing."""

    @abstractmethod
    def taken(self, index: Tensor) -> Shared:
        """Sequences of the batch, in another order or several times."""

    @property
    @abstractmethod
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class LowRank(Shared):
    """X = [X_1 | ... | X_G] ~ P [E_1 | ... | E_G].

    p  [batch, tokens, r]: P = X V_r, shared by the layers
    e  per layer [batch, r, D]: its slice of V_r^T
    """

    p: Tensor
    e: tuple[Tensor, ...]

    @classmethod
    def of(cls, layers: Sequence[Tensor], rule: Rule) -> LowRank | None:
        """The best approximation of rank r of each sequence by itself: V_r from the Gram matrix of all layers.

        With `energy` r is the largest that a sequence of the batch needs.  None where it takes as much as the states.
        """
        return _fitted([layers], rule)

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return self.p.shape[1]

    @property
    def nbytes(self) -> int:
        return self.p.nbytes + sum(e.nbytes for e in self.e)

    def rows(self, layer: int, low: int, high: int) -> Tensor:
        return self.p[:, low:high] @ self.e[layer]

    def weighted(self, layer: int, weights: Tensor, heads: int) -> Tensor:
        # (w P) E: the tokens are summed up in r dimensions, and no value is rebuilt.
        batch, _, queries, tokens = weights.shape
        inner = weights.reshape(batch, heads * queries, tokens) @ self.p
        e = self.e[layer]
        e = e.view(batch, e.shape[1], heads, -1).transpose(1, 2)  # [batch, heads, r, width]
        return inner.view(batch, heads, queries, -1) @ e

    def grown(self, layers: Sequence[Tensor], rule: Rule) -> LowRank | None:
        return _fitted([self, layers], rule)

    def taken(self, index: Tensor) -> LowRank:
        return LowRank(self.p.index_select(0, index), tuple(e.index_select(0, index) for e in self.e))


def _fitted(pieces: Sequence[LowRank | Sequence[Tensor]], rule: Rule) -> LowRank | None:
    """One basis for pieces that follow each other in time: states, and what was compressed before."""
    some = pieces[-1]
    assert not isinstance(some, LowRank)
    widths = [x.shape[2] for x in some]
    tokens = sum(piece.tokens if isinstance(piece, LowRank) else piece[0].shape[1] for piece in pieces)
    square = sum((_gram(piece) for piece in pieces[1:]), _gram(pieces[0]))  # [batch, G D, G D], float64
    if not bool(torch.isfinite(square).all()):
        raise NumericError("the cache holds keys or values that are NaN or Inf; nothing can be compressed")
    bases = [eigh(one) for one in square]
    rank = max(_rank(values.flip(0).clamp(min=0), rule) for values, _ in bases)
    rank = min(rank, tokens, sum(widths))
    if rank * (tokens + sum(widths)) >= tokens * sum(widths) and not rule.always:
        return None
    v = torch.stack([vectors.flip(1)[:, :rank] for _, vectors in bases])  # [batch, G D, r]
    v = v.to(torch.float32)
    dtype = some[0].dtype
    p = torch.cat([_projected(piece, v) for piece in pieces], 1).to(dtype)
    return LowRank(p, tuple(e.mT.to(dtype).contiguous() for e in torch.split(v, widths, 1)))


def _rank(squares: Tensor, rule: Rule) -> int:
    """How many of the falling squared singular values to keep, at least one."""
    if rule.rank is not None:
        return rule.rank
    return max(1, rank_for(squares.sqrt(), float(squares.sum()), energy=rule.energy))


def _gram(piece: LowRank | Sequence[Tensor]) -> Tensor:
    """X^T X of a piece: [batch, G D, G D] in float64, added up in slabs of tokens."""
    if isinstance(piece, LowRank):
        e, inner = torch.cat(piece.e, 2).double(), _gram([piece.p])
        return e.mT @ inner @ e
    width = sum(x.shape[2] for x in piece)
    total = piece[0].new_zeros(piece[0].shape[0], width, width, dtype=torch.float64)
    for low in range(0, piece[0].shape[1], _SLAB):
        slab = torch.cat([x[:, low : low + _SLAB] for x in piece], 2).double()
        total.baddbmm_(slab.mT, slab)
    return total


def _projected(piece: LowRank | Sequence[Tensor], v: Tensor) -> Tensor:
    """X V of a piece, float32 [batch, tokens, r]."""
    if isinstance(piece, LowRank):
        # (P E) V = P (E V): what was compressed before is never rebuilt.
        return piece.p.float() @ (torch.cat(piece.e, 2).float() @ v)
    parts = torch.split(v, [x.shape[2] for x in piece], 1)
    out: Tensor = piece[0].float() @ parts[0]
    for x, part in zip(piece[1:], parts[1:], strict=True):
        out += x.float() @ part
    return out


@dataclass(frozen=True)
class Slerp(Shared):
    """MiniCache: two layers share a direction per token and head, half way on the sphere; each has its norms.

    shared  [batch, tokens, D]; norms: per layer [batch, tokens, heads]
    kept    tokens and heads that stay exact, [n, 3] places (batch, token, head), and per layer their states [n, width]:
            those with an angle up to min + gamma (max - min), which is what the public code does
    """

    shared: Tensor
    norms: tuple[Tensor, ...]
    kept: Tensor
    exact: tuple[Tensor, ...]
    heads: int

    @classmethod
    def of(cls, layers: Sequence[Tensor], heads: int, gamma: float = 0.05) -> Slerp:
        """`heads`: of how many the D dimensions are made up."""
        if len(layers) != 2:
            raise ValueError(f"MiniCache joins pairs of layers, got {len(layers)}")
        batch, tokens, _ = layers[0].shape
        one, two = (x.float().view(batch, tokens, heads, -1) for x in layers)
        norms = tuple(x.norm(dim=-1, keepdim=True) for x in (one, two))
        u, w = (x / n.clamp(min=1e-30) for x, n in zip((one, two), norms, strict=True))
        angle = (u * w).sum(-1, keepdim=True).clamp(-1, 1).acos()
        # sin(angle / 2) / sin(angle) of both; parallel rows have no plane to turn in, and are averaged.
        share = torch.where(angle < 1e-4, 0.5, (angle / 2).sin() / angle.sin().clamp(min=1e-30))
        real = (norms[0] > 0) & (norms[1] > 0)  # padding has no angle
        low, high = (angle[real].min(), angle[real].max()) if bool(real.any()) else (angle.sum(), angle.sum())
        near = (real & (angle <= low + gamma * (high - low)))[..., 0]
        dtype = layers[0].dtype
        kept = near.nonzero()
        return cls(
            (share * (u + w)).reshape(batch, tokens, -1).to(dtype),
            tuple(n[..., 0].to(dtype) for n in norms),
            kept.to(torch.int32),
            tuple(x[near].to(dtype) for x in (one, two)),
            heads,
        )

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return self.shared.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.shared, self.kept, *self.norms, *self.exact))

    def rows(self, layer: int, low: int, high: int) -> Tensor:
        batch, width = self.shared.shape[0], self.shared.shape[2]
        found = (
            self.shared[:, low:high].view(batch, high - low, self.heads, -1) * self.norms[layer][:, low:high, :, None]
        )
        here = (self.kept[:, 1] >= low) & (self.kept[:, 1] < high)
        place = self.kept[here].long()
        found[place[:, 0], place[:, 1] - low, place[:, 2]] = self.exact[layer][here]
        return found.view(batch, high - low, width)

    def weighted(self, layer: int, weights: Tensor, heads: int) -> Tensor:
        batch, _, queries, _ = weights.shape
        out = weights.new_zeros(batch, heads, queries, self.shared.shape[2] // heads)
        for low in range(0, self.tokens, TILE):
            high = min(low + TILE, self.tokens)
            rows = self.rows(layer, low, high).view(batch, high - low, heads, -1).transpose(1, 2)
            out += weights[..., low:high] @ rows
        return out

    def grown(self, layers: Sequence[Tensor], rule: Rule) -> Slerp:
        new = Slerp.of(layers, self.heads)
        kept = new.kept.clone()
        kept[:, 1] += self.tokens
        return Slerp(
            torch.cat([self.shared, new.shared], 1),
            tuple(torch.cat(pair, 1) for pair in zip(self.norms, new.norms, strict=True)),
            torch.cat([self.kept, kept]),
            tuple(torch.cat(pair) for pair in zip(self.exact, new.exact, strict=True)),
            self.heads,
        )

    def taken(self, index: Tensor) -> Slerp:
        rows = [torch.nonzero(self.kept[:, 0] == old)[:, 0] for old in index.tolist()]
        chosen = torch.cat(rows)
        kept = self.kept[chosen].clone()
        kept[:, 0] = torch.repeat_interleave(
            torch.arange(len(rows), dtype=torch.int32), torch.tensor([len(row) for row in rows])
        ).to(kept.device)
        return Slerp(
            self.shared.index_select(0, index),
            tuple(n.index_select(0, index) for n in self.norms),
            kept,
            tuple(x[chosen] for x in self.exact),
            self.heads,
        )
