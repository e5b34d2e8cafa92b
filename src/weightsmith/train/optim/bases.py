"""Fixed orthogonal bases, built in float64 and shared by everything of one size, dtype and device."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = ["BASES", "Kind", "basis", "dct2", "dct3"]

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
    N = 8192.  Equal arguments give the same tensor while somebody holds it.
    """
    key = (kind, size, dtype, device)
    found = _SHARED.get(key)
    if found is None:
        exact = _random(size) if kind == "random" else _cosines(size)
        found = (exact.T if kind == "dct2" else exact).contiguous().to(device=device, dtype=dtype)
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


@lru_cache(maxsize=64)
def _order(size: int, device: torch.device) -> Tensor:
    """Even positions, then odd ones backwards: int64 [size]."""
    i = torch.arange(size, device=device)
    return torch.cat([i[::2], i[1::2].flip(0)])


@lru_cache(maxsize=64)
def _places(size: int, device: torch.device) -> Tensor:
    """Where each position has gone to in `_order`: int64 [size]."""
    return _order(size, device).argsort()


@lru_cache(maxsize=64)
def _twiddle(size: int, dtype: torch.dtype, device: torch.device, inverse: bool = False) -> Tensor:
    """sqrt(2 / N) exp(-i pi k / (2 N)) for k = 0 .. N / 2, the first divided by sqrt(2): complex [N // 2 + 1].

    inverse  their reciprocals, since a complex division takes ten times as long as a product
    """
    k = torch.arange(size // 2 + 1, dtype=torch.float64)
    found = torch.polar(torch.full_like(k, math.sqrt(2 / size)), -math.pi * k / (2 * size))
    found[0] *= math.sqrt(0.5)
    return (1 / found if inverse else found).to(device=device, dtype=dtype.to_complex())


def dct2(rows: Tensor) -> Tensor:
    """rows Q^T of `basis("dct3")`: float32 or float64 [n, N] -> [n, N]."""
    size = rows.shape[1]
    spectrum = torch.fft.rfft(rows.index_select(1, _order(size, rows.device)))
    spectrum *= _twiddle(size, rows.dtype, rows.device)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    half = size // 2 + 1
    out[:, :half] = spectrum.real
    out[:, half:] = -spectrum.imag[:, 1 : size - half + 1].flip(1)  # entry N - k belongs to frequency k
    return out


def dct3(rows: Tensor) -> Tensor:
    """rows Q of `basis("dct3")`, the inverse of `dct2`: float32 or float64 [n, N] -> [n, N]."""
    size = rows.shape[1]
    half = size // 2 + 1
    imaginary = torch.zeros_like(rows[:, :half])
    imaginary[:, 1:] = rows[:, size - half + 1 :].flip(1)  # half - 1 entries: N - 1, N - 2, ...
    spectrum = torch.complex(rows[:, :half].contiguous(), imaginary.neg_())
    spectrum *= _twiddle(size, rows.dtype, rows.device, inverse=True)
    found: Tensor = torch.fft.irfft(spectrum, n=size)
    return found.index_select(1, _places(size, rows.device))
