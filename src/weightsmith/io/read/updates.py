"""What an adapter adds to one weight, as it is stored: LoRA, LoHa, LoKr, whole differences, LoRA of fused experts.

    Product   B A                                LoRA, arXiv:2106.09685; LoCon, with a factor between; convolutions
    Experts   B_e A_e for each expert e          LoRA on a parameter [experts, outputs, inputs] (target_parameters)
    Hadamard  (B_1 A_1) * (B_2 A_2)              LoHa, arXiv:2108.06098
    Kronecker W_1 (x) W_2                        LoKr, arXiv:2212.10650
    Full      the difference itself

Each knows its exact product of two thin matrices (`pieces`) and how its rows are calculated (`load`, `rows`), in the
same order of summation for every cut.  Scales (alpha / r) are not in here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from weightsmith.core.lazy import torch
from weightsmith.io.read.source import Source
from weightsmith.ops.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Experts", "Full", "Hadamard", "Kronecker", "LowRank", "Matrix", "Product", "Rows", "Update", "assembled"]

Loaded = tuple["Tensor", ...]


class Update(ABC):
    """What is added to a weight, before its scale.

    shape  [outputs, inputs, *kernel], with the experts in front for `Experts`
    rank   of its exact product, per piece
    chunk  rows that are calculated together: a BLAS may order its sums by the shape it is given, so this one is fixed
    """

    chunk = 64

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    @abstractmethod
    def stored(self) -> tuple[str, ...]:
        """The tensors of the adapter's file that it is made of."""

    @abstractmethod
    def load(self, file: Source, flip: bool = False) -> Loaded:
        """What `rows` needs, in float32; `flip`: of the transposed weight [inputs, outputs]."""

    @abstractmethod
    def rows(self, loaded: Loaded, start: int, stop: int) -> Tensor:
        """Rows of the weight: [stop - start, everything else]."""

    @abstractmethod
    def pieces(self, file: Source) -> list[Factors]:
        """b [outputs, r] and a [r, inputs * kernel] in float32: one pair, or one per expert or group."""


class LowRank(Update):
    """A change that is one product of two thin matrices."""

    @abstractmethod
    def factors(self, file: Source) -> Factors:
        """b [outputs, r] and a [r, inputs * kernel] in float32."""

    def load(self, file: Source, flip: bool = False) -> Loaded:
        b, a = self.factors(file)
        return (a.T.contiguous(), b.T.contiguous()) if flip else (b.contiguous(), a.contiguous())

    def rows(self, loaded: Loaded, start: int, stop: int) -> Tensor:
        left, right = loaded
        return left[start:stop] @ right

    def pieces(self, file: Source) -> list[Factors]:
        return [self.factors(file)]


@dataclass(frozen=True)
class Product(LowRank):
    """B A, from tensors A [r, inputs, *kernel] and B [outputs, r, 1, ...]; `mid` [r, r, *kernel] lies between them.

    groups  of a grouped convolution: B [outputs, r / groups, ...] takes its part of A's rows, group by group
    turned  both tensors are stored the other way round, A [inputs, r] and B [r, outputs]
    table   they belong to an embedding, whose weight is stored [inputs, outputs]
    """

    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    mid: str | None = None
    kernel: tuple[int, ...] = ()
    turned: bool = False
    table: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.b_shape[0], *self.a_shape[1 : 2 if self.mid else None], *(self.kernel if self.mid else ()))

    @property
    def rank(self) -> int:
        return self.b_shape[1]

    @property
    def groups(self) -> int:
        return self.a_shape[0] // max(self.b_shape[1], 1)

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(name for name in (self.a, self.mid, self.b) if name)

    def factors(self, file: Source) -> Factors:
        a, b = file.read(self.a).float(), file.read(self.b).float()
        if self.turned:
            return Factors(b.T.contiguous(), a.T.contiguous())
        if self.mid is not None:
            a = torch.einsum("mn...,nj->mj...", file.read(self.mid).float(), a.reshape(a.shape[0], -1))
        return Factors(b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1))

    def pieces(self, file: Source) -> list[Factors]:
        b, a = self.factors(file)
        parts = zip(b.chunk(self.groups), a.chunk(self.groups), strict=True)
        return [Factors(*part) for part in parts] if self.groups > 1 else [Factors(b, a)]


@dataclass(frozen=True)
class Rows(Update):
    """Rows first..last of another update: what a fused matrix adds to one of the matrices in it."""

    of: Update
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.last - self.first, *self.of.shape[1:])

    @property
    def rank(self) -> int:
        return self.of.rank

    @property
    def stored(self) -> tuple[str, ...]:
        return self.of.stored

    def load(self, file: Source, flip: bool = False) -> Loaded:
        if flip:
            raise NotImplementedError  # fused matrices are stored [out, in]
        return self.of.load(file)

    def rows(self, loaded: Loaded, start: int, stop: int) -> Tensor:
        return self.of.rows(loaded, self.first + start, self.first + stop)

    def pieces(self, file: Source) -> list[Factors]:
        return [Factors(b[self.first : self.last], a) for b, a in self.of.pieces(file)]


@dataclass(frozen=True)
class Experts(Update):
    """B_e A_e: the rows of A [experts * r, inputs] go expert by expert, the columns of B [outputs, r * experts] rank
    by rank."""

    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    count: int

    chunk = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, self.b_shape[0], self.a_shape[1])

    @property
    def rank(self) -> int:
        return self.a_shape[0] // self.count

    @property
    def stored(self) -> tuple[str, ...]:
        return self.a, self.b

    def load(self, file: Source, flip: bool = False) -> Loaded:
        a = file.read(self.a).float().reshape(self.count, self.rank, -1)
        b = file.read(self.b).float().reshape(-1, self.rank, self.count).permute(2, 0, 1)
        return (a.mT.contiguous(), b.mT.contiguous()) if flip else (b.contiguous(), a.contiguous())

    def rows(self, loaded: Loaded, start: int, stop: int) -> Tensor:
        left, right = loaded
        return torch.stack([left[e] @ right[e] for e in range(start, stop)]).flatten(1)

    def pieces(self, file: Source) -> list[Factors]:
        return [Factors(b, a) for b, a in zip(*self.load(file), strict=True)]


@dataclass(frozen=True)
class Matrix:
    """A matrix that is stored as such (`whole`), or as a product b a, or as b t a with a small core t [r, r, *kernel].

    With a core, b is stored [r, outputs].  shape: [outputs, inputs, *kernel].
    """

    shape: tuple[int, ...]
    rank: int
    whole: str = ""
    b: str = ""
    a: str = ""
    core: str = ""

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(name for name in (self.whole, self.core, self.b, self.a) if name)

    def factors(self, file: Source) -> Factors:
        if self.whole:
            full = file.read(self.whole).float().flatten(1)
            eye = torch.eye(min(full.shape))
            return Factors(eye, full) if full.shape[0] <= full.shape[1] else Factors(full, eye)
        b, a = file.read(self.b).float(), file.read(self.a).float()
        if self.core:
            core = file.read(self.core).float()
            return Factors(b.T.contiguous(), torch.einsum("ij...,jr->ir...", core, a).flatten(1))
        return Factors(b, a)

    def read(self, file: Source) -> Tensor:
        """[outputs, inputs * kernel]."""
        return file.read(self.whole).float().flatten(1) if self.whole else self.factors(file).product


@dataclass(frozen=True)
class Hadamard(Update):
    one: Matrix
    two: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.one.shape

    @property
    def rank(self) -> int:
        return self.one.rank * self.two.rank

    @property
    def stored(self) -> tuple[str, ...]:
        return self.one.stored + self.two.stored

    def load(self, file: Source, flip: bool = False) -> Loaded:
        (b1, a1), (b2, a2) = self.one.factors(file), self.two.factors(file)
        return (a1.T, b1.T, a2.T, b2.T) if flip else (b1, a1, b2, a2)

    def rows(self, loaded: Loaded, start: int, stop: int) -> Tensor:
        b1, a1, b2, a2 = loaded
        return (b1[start:stop] @ a1) * (b2[start:stop] @ a2)

    def pieces(self, file: Source) -> list[Factors]:
        """(b1 a1) * (b2 a2): every column of b1 times every column of b2, and the same for the rows of a."""
        (b1, a1), (b2, a2) = self.one.factors(file), self.two.factors(file)
        return [Factors((b1[:, :, None] * b2[:, None, :]).flatten(1), (a1[:, None] * a2[None]).flatten(0, 1))]


@dataclass(frozen=True)
class Kronecker(Update):
    one: Matrix
    two: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        (a, b, *_), (c, d, *kernel) = self.one.shape, self.two.shape
        return (a * c, b * d, *kernel)

    @property
    def rank(self) -> int:
        return self.one.rank * self.two.rank

    @property
    def stored(self) -> tuple[str, ...]:
        return self.one.stored + self.two.stored

    def load(self, file: Source, flip: bool = False) -> Loaded:
        one, two = self.one.read(file), self.two.read(file)
        return (one.T.contiguous(), two.T.contiguous()) if flip else (one, two)

    def rows(self, loaded: Loaded, start: int, stop: int) -> Tensor:
        one, two = loaded
        row = torch.arange(start, stop)
        return (one[row // len(two)][:, :, None] * two[row % len(two)][:, None, :]).flatten(1)

    def pieces(self, file: Source) -> list[Factors]:
        (b1, a1), (b2, a2) = self.one.factors(file), self.two.factors(file)
        return [Factors(_kron(b1, b2), _kron(a1, a2))]


@dataclass(frozen=True)
class Full(Update):
    diff: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.diff.shape

    @property
    def rank(self) -> int:
        return min(self.shape[0], prod(self.shape[1:]))

    @property
    def stored(self) -> tuple[str, ...]:
        return self.diff.stored

    def load(self, file: Source, flip: bool = False) -> Loaded:
        full = self.diff.read(file)
        return (full.T.contiguous() if flip else full,)

    def rows(self, loaded: Loaded, start: int, stop: int) -> Tensor:
        return loaded[0][start:stop]

    def pieces(self, file: Source) -> list[Factors]:
        return [self.diff.factors(file)]


def _kron(one: Tensor, two: Tensor) -> Tensor:
    """As torch.kron, which takes no factor that is a view."""
    size = (one.shape[0] * two.shape[0], one.shape[1] * two.shape[1])
    return (one[:, None, :, None] * two[None, :, None, :]).reshape(size)


def assembled(update: Update, found: Sequence[Factors]) -> Factors:
    """Pieces of one rank as the B and A of a file: groups one after the other, experts as `Experts` stores them."""
    if len(found) == 1:
        return found[0]
    if isinstance(update, Experts):
        b = torch.stack([part.b for part in found], 2)  # [outputs, r, experts]
        return Factors(b.flatten(1), torch.cat([part.a for part in found]))
    return Factors(torch.cat([part.b for part in found]), torch.cat([part.a for part in found]))
