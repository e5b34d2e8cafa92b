"""All experts added up under random orthogonal matrices, which bring any of them back, with the others as noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.checks import Case, Verdict, dims, refuse
from weightsmith.core.keys import Key, Part
from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, StandaloneCodec, Whole, choice, integer, number
from weightsmith.core.site import Site
from weightsmith.ops.binders import generator, haar, hadamard
from weightsmith.ops.noise import uniform_bits
from weightsmith.ops.reduce import pairwise_sum, row_squares

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mbat", "predicted"]

_DENSE = 2048  # inputs up to which a dense matrix is drawn for every expert and tensor
_LOST = "without denoising nothing is saved beyond 2 experts: each comes back with an error of about sqrt(n - 1); "


@dataclass(frozen=True)
class Mbat(Whole, StandaloneCodec, name="mbat", needs=(BASE,), checks=(dims(2),), otherwise="exact"):
    """Store one sum of all changes, each bound to a matrix of its own; the others come back as noise.

    S = sum_i bind_i(T_i) is stored once; T_i + crosstalk = unbind_i(S) comes back, the crosstalk dense and of the norm
    of all others together: sqrt(n - 1) of the expert's, if they are alike.  It is not lossless; what helps is known of
    the changes:

    shrink   nothing: T_i is scaled by |T_i|^2 / sum_j |T_j|^2 (Wiener); refused for more than two experts
    sparse   most entries are zero: those above k sigma are kept, sigma that of the crosstalk in their row.  Signs
             would leave foreign changes as sparse as they are, so it needs a rotation (`hadamard`, `dense`)
    lowrank  T_i has a small rank: the crosstalk of signs has full rank, and is cut off by the stored directions of
             the leading singular values.  Rotations keep foreign singular values, so it needs `sign`

    sign multiplies entries by +-1; hadamard and dense rotate every row.  Tensors that are no matrices are stored as
    they are (`exact`).
    """

    paper = "MBAT with orthogonal matrices (Gallant, 2022), arXiv:2202.04771; its use on task vectors is ours"

    binder: str = choice("sign", "what binds a change to its expert", "sign", "hadamard", "dense")
    denoise: str = choice("shrink", "what is done against the others' noise", "none", "shrink", "sparse", "lowrank")
    k: float = number(3.0, "sparse: threshold in standard deviations of the noise", low=0)
    rank: int = integer(8, "lowrank: singular directions kept", low=1)

    def check(self, case: Case) -> Iterable[Verdict]:
        if case.key is not None:
            wide = self.binder == "dense" and len(case.key.shape) == 2 and case.key.shape[1] > _DENSE
            return refuse(
                f"{case.key.name} has {case.key.shape[1]} inputs, and dense matrices are drawn up to {_DENSE}; "
                "choose binder hadamard" if wide else None
            )  # fmt: skip
        if self.denoise == "lowrank" and self.binder != "sign":
            return refuse(f"binder {self.binder} keeps the others' singular values; lowrank needs binder sign")
        if self.denoise == "sparse" and self.binder == "sign":
            return refuse("binder sign leaves foreign changes sparse; denoise sparse needs binder hadamard or dense")
        if self.denoise in ("none", "shrink") and case.count > 2:
            return refuse(_LOST + "choose denoise sparse or lowrank where that fits, or another codec")
        return ()

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        found = [Part.of(key, "sum", key.shape, max(key.row_numel, 1))]
        for e in experts:
            found.append(Part("stream", Key(f"{key.name}::stream.{e}", (1,), "int64"), 0, e))
            if self.denoise == "shrink":
                found.append(Part("alpha", Key(f"{key.name}::alpha.{e}", (1,), "float32"), 0, e))
            elif self.denoise == "sparse":
                sigma = Key(f"{key.name}::sigma.{e}", (key.rows,), "float32")
                found.append(Part("sigma", sigma, max(key.row_numel, 1), e))
            elif self.denoise == "lowrank":
                found.append(Part.of(key, "v", (key.row_numel, self._rank(key)), 0, e))
        return tuple(found)

    def encode(self, site: Site) -> dict[str, Tensor]:
        name, deltas = site.key.name, list(site.deltas)
        streams = [int(uniform_bits(site.seed, name, expert, "mbat", 0, 1)[0]) for expert in site.names]
        added: Tensor = torch.zeros_like(deltas[0])
        for stream, delta in zip(streams, deltas, strict=True):
            added = added + self._bound(delta, stream, 0)
        rows = [row_squares(delta) for delta in deltas]
        squares = [float(pairwise_sum(row)) for row in rows]
        found = {f"{name}::sum": added}
        for i, (expert, stream) in enumerate(zip(site.names, streams, strict=True)):
            others = torch.stack([row for j, row in enumerate(rows) if j != i] or [torch.zeros_like(rows[i])]).sum(0)
            found[f"{name}::stream.{expert}"] = torch.tensor([stream], dtype=torch.int64)
            if self.denoise == "shrink":
                alpha = squares[i] / sum(squares) if sum(squares) else 1.0
                found[f"{name}::alpha.{expert}"] = torch.tensor([alpha], dtype=torch.float32)
            elif self.denoise == "sparse":
                found[f"{name}::sigma.{expert}"] = (others / max(site.key.row_numel, 1)).sqrt().float().cpu()
            elif self.denoise == "lowrank":
                found[f"{name}::v.{expert}"] = self._directions(self._unbound(added, stream, 0), site.key)
            site.tell(f"mbat.size.{expert}", squares[i])
            site.tell(f"mbat.error.{expert}", predicted(self, deltas[i], others) ** 2 * squares[i])
        return found

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        if base.numel() == 0:
            return base
        back: Tensor = self._unbound(parts["sum"], int(parts["stream"].reshape(-1)[0]), offset)
        if self.denoise == "shrink":
            back = back * parts["alpha"].reshape(-1)[0]
        elif self.denoise == "sparse":
            back = torch.where(back.abs() > self.k * parts["sigma"][:, None].to(back), back, 0.0)
        elif self.denoise == "lowrank":
            back = (back @ parts["v"]) @ parts["v"].mT
        found: Tensor = base + back.reshape(base.shape)
        return found

    def says(self, told: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Iterable[str]:
        lost = {}
        for expert in names:
            size, error = (
                math.fsum(own.get(f"mbat.{what}.{expert}", 0.0) for own in told.values()) for what in ("size", "error")
            )
            if size:
                lost[expert] = math.sqrt(error / size)
        if lost:
            said = ", ".join(f"{value:.1%} of {name}'s change" for name, value in lost.items())
            yield f"mbat predicts to lose {said}; what is lost is measured beside it"

    def advice(self) -> str:
        return "choose denoise sparse or lowrank for mbat where the changes are so, or fewer experts"

    def _rank(self, key: Key) -> int:
        return min(self.rank, *key.shape)

    def _directions(self, back: Tensor, key: Key) -> Tensor:
        """The leading right singular vectors of what comes back: [inputs, rank]."""
        rank = self._rank(key)
        gram = back.double().mT @ back.double()
        found: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -rank:].to(back.dtype).contiguous()
        return found

    def _bound(self, change: Tensor, stream: int, offset: int) -> Tensor:
        if self.binder == "sign":
            return change * _signs(stream, offset, change)
        if self.binder == "hadamard":
            return hadamard(generator("mbat", stream), change.shape[1]).bind(change)
        return change @ _dense(stream, change).mT

    def _unbound(self, stored: Tensor, stream: int, offset: int) -> Tensor:
        if self.binder == "sign":
            return stored * _signs(stream, offset, stored)
        if self.binder == "hadamard":
            return hadamard(generator("mbat", stream), stored.shape[1]).unbind(stored)
        return stored @ _dense(stream, stored)


def predicted(codec: Mbat, change: Tensor, others: Tensor) -> float:
    """The relative error of one expert's tensor; others: squared norms of the rows of all other changes together.

    none: |others| / |T|;  shrink: sqrt(1 - alpha);  sparse: noise on the entries that are kept, what of it is above
    the threshold elsewhere, and entries below it;  lowrank: noise in the r (m + n - r) dimensions of such matrices.
    """
    size, noise = float(change.double().square().sum()), float(others.sum())
    if not size or not noise:
        return 0.0
    ratio = noise / size
    if codec.denoise == "shrink":
        return math.sqrt(ratio / (1 + ratio))
    count = change.numel()
    if codec.denoise == "sparse":
        tail = 2 * (codec.k * math.exp(-(codec.k**2) / 2) / math.sqrt(2 * math.pi)) + math.erfc(codec.k / math.sqrt(2))
        variance = (others / change.shape[1])[:, None]
        seen = change.double().square() > codec.k**2 * variance
        lost = torch.where(seen, variance, change.double().square() + variance * tail)
        return math.sqrt(float(lost.sum()) / size)
    if codec.denoise == "lowrank":
        rows, columns = change.shape
        rank = min(codec.rank, rows, columns)
        return math.sqrt(ratio * rank * (rows + columns - rank) / count)
    return math.sqrt(ratio)


def _signs(stream: int, offset: int, like: Tensor) -> Tensor:
    """Random signs for the flat positions from `offset` on, shaped like a block."""
    bits = uniform_bits(stream, "", "", "mbat signs", offset, like.numel()) & 1
    return torch.from_numpy(bits.astype("float32") * 2 - 1).reshape(like.shape).to(like)


def _dense(stream: int, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(haar(generator("mbat", stream), like.shape[1]))).to(like)
