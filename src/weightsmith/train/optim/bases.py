"""Fixed orthogonal bases, built in float64 and shared by everything of one size, dtype and device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = ["BASES", "Fourier", "Kind", "basis", "fourier"]

Kind = Literal["dct3", "dct2", "random"]

BASES: tuple[Kind, ...] = ("dct3", "dct2", "random")

_SHARED: WeakValueDictionary[tuple[Kind, int, torch.dtype, torch.device], Tensor] = WeakValueDictionary()
"""Alive as long as an optimizer or projector holds them."""


def basis(kind: Kind, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An orthogonal matrix [size, size] whose columns are the directions to choose from.

    dct3    Q[i, j] = sqrt(2 / N) cos(pi i (2 j + 1) / (2 N)), row 0 divided by sqrt(2): A Q is a DCT-III of A's rows
    dct2    Q^T: A Q^T is a DCT-II of A's rows
    random  the orthogonal factor of a normal matrix, the same for a size in every process

    Columns are orthonormal to the accuracy of `dtype`: a cosine taken in float32 would already be off by 1e-6 at
    N = 8192.  Equal arguments give the same tensor while somebody holds it.  Columns lie one after the other in memory,
    since it is columns that are taken from it.
    """
    key = (kind, size, dtype, device)
    found = _SHARED.get(key)
    if found is None:
        exact = _random(size) if kind == "random" else _cosines(size)
        found = (exact if kind == "dct2" else exact.T).contiguous().to(device=device, dtype=dtype).T
        _SHARED[key] = found
    return found


def _cosines(size: int) -> Tensor:
    i = torch.arange(size, dtype=torch.int64)
    # The angle repeats every 4 N: reducing the product exactly keeps full accuracy for large i j.
    angle = (i[:, None] * (2 * i[None, :] + 1)) % (4 * size)
    found: Tensor = math.sqrt(2 / size) * torch.cos(angle.double() * (math.pi / (2 * size)))
    found[0] *= math.sqrt(0.5)
    return found


def _random(size: int) -> Tensor:
    draw = torch.Generator().manual_seed(size)
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw))
    return torch.where(r.diagonal() < 0, -q, q)  # uniform over rotations (Mezzadri 2007)


# --- the same products by FFT, O(n N log N) instead of O(n N^2) (Makhoul 1980) ------------------------------------


@dataclass(frozen=True, eq=False)
class Fourier:
    """rows Q of one of the two cosine bases, coordinates in the order in which the FFT leaves them.

    Each step touches the rows once.  Putting coordinates in the basis's own order would be another step, which a caller
    that needs norms or a few columns does for these alone: coordinate j stands at places[j].  The entries of a row are
    read in the order in which the other basis's transform, which goes back, leaves its coordinates.

    reads    int64: which entries of a row the FFT takes
    turns    complex [N // 2 + 1]: what its frequencies are multiplied with
    places   int64 [N]
    inverse  from entries as frequencies to coordinates (dct3), or from entries to frequencies as coordinates (dct2)
    """

    reads: Tensor
    turns: Tensor
    places: Tensor
    inverse: bool

    def __call__(self, rows: Tensor) -> Tensor:
        """float32 or float64 rows [n, N] -> their coordinates [n, N], for dct2 and one or two that mean nothing."""
        if rows.stride(1) == 1:
            return self.turned(rows.index_select(1, self.reads), rows.shape[1])
        # The transpose of a wide matrix: whole rows of that are quicker to take.
        return self.turned(rows.T.index_select(0, self.reads).T.contiguous(), rows.shape[1])

    def turned(self, taken: Tensor, size: int) -> Tensor:
        """The same of entries [n, len(reads)] that were read already."""
        if self.inverse:
            spectrum = torch.view_as_complex(taken.reshape(len(taken), -1, 2))
            out: Tensor = torch.fft.irfft(spectrum * self.turns, n=size)
            return out
        spectrum = torch.fft.rfft(taken)
        spectrum *= self.turns
        return torch.view_as_real(spectrum).flatten(1)


@lru_cache(maxsize=64)
def fourier(kind: Kind, size: int, dtype: torch.dtype, device: torch.device) -> Fourier:
    """The transform that equals a product with `basis(kind, ...)`, kind dct3 or dct2.

    With c_k = sqrt(2 / N) exp(-i pi k / (2 N)), c_0 divided by sqrt(2), and s the row's even entries followed by its
    odd ones backwards, the DCT-II of a row has Re(c_k F_k) at k and -Im(c_k F_k) at N - k, F the FFT of s; a DCT-III
    goes the same way back.  All is conjugated here, which spares the sign: of s reversed, or with the result reversed.
    """
    k, j = torch.arange(size // 2 + 1), torch.arange(size)
    angle = k.double() * (math.pi / (2 * size))
    length = torch.full_like(angle, math.sqrt(2 / size))
    length[0] *= math.sqrt(0.5)
    backwards = torch.cat([j[::2], j[1::2].flip(0)])[-j % size]  # the entries of s, reversed
    if kind == "dct3":
        turns = torch.polar(1 / length, -angle)
        if size % 2 == 0:
            turns[-1] = math.sqrt(2) / length[-1]  # it has a real part only, and one entry to read
        reads, places = torch.stack([k, -k % size], 1).flatten(), backwards.argsort()
    else:
        turns, reads = torch.polar(length, angle), backwards
        places = torch.where(j <= size // 2, 2 * j, 2 * (size - j) + 1)  # of real and imaginary parts
    turns = turns.to(device=device, dtype=dtype.to_complex())
    return Fourier(reads.to(device), turns, places.to(device), kind == "dct3")
