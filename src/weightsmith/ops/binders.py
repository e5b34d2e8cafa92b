"""Random orthogonal matrices that bind vectors to keys: dense ones, and products of Walsh-Hadamard transforms.

Gallant, "Orthogonal Matrices for MBAT Vector Symbolic Architectures" (arXiv:2202.04771): M M^T = I keeps norms and
angles at any depth of nesting.  Full text not at hand; the families are the published ones.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from weightsmith.core.lazy import torch

__all__ = ["Hadamard", "generator", "haar", "hadamard", "walsh"]

Array = TypeVar("Array")
"""A NumPy array or a torch tensor."""


def generator(*words: object) -> np.random.Generator:
    """Random numbers for a name: PCG64 of its SHA-256, the same in every process."""
    seed = hashlib.sha256("\0".join(map(str, words)).encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(seed, "little")))


def haar(draw: np.random.Generator, size: int) -> np.ndarray:
    """A Haar orthogonal matrix: Q of a Gaussian one, with signs that make it unique: [size, size] float64."""
    q, r = np.linalg.qr(draw.standard_normal((size, size)))
    return np.asarray(q * np.where(np.diag(r) < 0, -1.0, 1.0))


def walsh(x: Array) -> Array:
    """The normalised Walsh-Hadamard transform of the last axis, which is a power of two long; its own inverse."""
    value: Any = x
    size = value.shape[-1]
    flat, half = value.reshape(-1, size), 1
    while half < size:
        pairs = flat.reshape(-1, size // (2 * half), 2, half)
        flat = pairs[:, :, [1, 0]]  # a copy with b first: then b + a, and a - b
        flat[:, :, 0] += pairs[:, :, 0]
        flat[:, :, 1] -= pairs[:, :, 1]
        half *= 2
    out: Array = (flat / math.sqrt(size)).reshape(value.shape)
    return out


@dataclass(frozen=True, eq=False)
class Hadamard:
    """M = P H D2 H D1 on the last axis: signs D1 and D2, transforms H, a permutation P.  O(n log n), no matrix.

    Lengths that are no power of two are cut into such, each of which has a transform of its own.
    """

    signs: tuple[np.ndarray, np.ndarray]
    order: np.ndarray

    def bind(self, x: Array) -> Array:
        """M x."""
        first, second = (_like(signs, x) for signs in self.signs)
        found: Any = _pieces(_pieces(x * first) * second)
        out: Array = _taken(found, self.order)
        return out

    def unbind(self, x: Array) -> Array:
        """M^T x."""
        first, second = (_like(signs, x) for signs in self.signs)
        placed: Any = _taken(x, np.argsort(self.order))
        out: Array = _pieces(_pieces(placed) * second) * first
        return out


def hadamard(draw: np.random.Generator, size: int) -> Hadamard:
    signs = (draw.choice(np.array([-1.0, 1.0], np.float32), size), draw.choice(np.array([-1.0, 1.0], np.float32), size))
    return Hadamard(signs, draw.permutation(size))


def _pieces(x: Any) -> Any:
    size, start = x.shape[-1], 0
    if size & (size - 1) == 0:
        return walsh(x)
    out = x * 1
    for bit in reversed(range(size.bit_length())):
        if size >> bit & 1:
            stop = start + (1 << bit)
            out[..., start:stop] = walsh(out[..., start:stop])
            start = stop
    return out


def _like(signs: np.ndarray, x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return signs.astype(x.dtype, copy=False)
    return x.new_tensor(signs)


def _taken(x: Any, order: np.ndarray) -> Any:
    if isinstance(x, np.ndarray):
        return x[..., order]
    return x.index_select(x.ndim - 1, torch.from_numpy(order).to(x.device))
