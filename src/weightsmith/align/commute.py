"""Matrices that a head may be multiplied by: those that commute with its rotary position embeddings.

Scores are (R_s q)^T (R_t k).  q' = A q and k' = C k keep them for all positions if C = A^-T and A commutes with every
R_d.  Rotations turn pairs of entries, each with a frequency of its own: then A scales and turns every pair by itself
(a I + b J), and nothing else.  Pairs of one frequency may be mixed as complex numbers, those of frequency 0 and
entries that are not turned by any invertible matrix.  Derived, and checked by running models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from weightsmith.core.errors import RecipeError

__all__ = ["Commutant", "Pairing", "commutant", "dense", "refuse_unless_commuting", "scales"]

Pairing = Literal["none", "half", "interleaved"]
"""Which entries are turned together: i and i + turned / 2, or 2 i and 2 i + 1."""

_FINE = 1e-9  # of the largest entry


@dataclass(frozen=True)
class Commutant:
    """What commutes with the rotations of a head of `width` entries.

    turning  sets of pairs that have one frequency;  free  entries that nothing turns
    """

    width: int
    turning: tuple[tuple[tuple[int, int], ...], ...]
    free: tuple[int, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        return tuple(pair for same in self.turning for pair in same)

    def drawn(self, draw: np.random.Generator, condition: float) -> np.ndarray:
        """A random matrix of it, [width, width] float64, with a condition number of at most `condition`."""
        found = np.zeros((self.width, self.width))
        if self.free:
            found[np.ix_(self.free, self.free)] = dense(draw, len(self.free), condition)
        alone = np.array([same[0] for same in self.turning if len(same) == 1], dtype=np.int64).reshape(-1, 2)
        one, two = alone.T
        turns = scales(draw, len(alone), condition) * np.exp(1j * draw.uniform(0, 2 * np.pi, len(alone)))
        found[one, one] = found[two, two] = turns.real
        found[two, one], found[one, two] = turns.imag, -turns.imag
        for same in (same for same in self.turning if len(same) > 1):
            mixed = _complex(draw, len(same), condition)
            for i, (a, b) in enumerate(same):
                for j, (c, d) in enumerate(same):
                    found[np.ix_((a, b), (c, d))] = _real(mixed[i, j])
        return found


def commutant(
    width: int, turned: int = 0, pairing: Pairing = "half", frequencies: np.ndarray | None = None
) -> Commutant:
    """For heads whose first `turned` entries are turned.  frequencies: [turned / 2], default: all are different."""
    half = turned // 2
    if pairing == "none" or not half:
        return Commutant(width, (), tuple(range(width)))
    if turned % 2 or turned > width:
        raise RecipeError(f"{turned} of {width} entries cannot be turned in pairs")
    pairs = [(i, i + half) if pairing == "half" else (2 * i, 2 * i + 1) for i in range(half)]
    known = np.arange(1, half + 1) if frequencies is None else np.asarray(frequencies, dtype=np.float64)
    if known.shape != (half,):
        raise RecipeError(f"{half} pairs have {known.size} frequencies")
    still = [entry for pair, value in zip(pairs, known, strict=True) if value == 0 for entry in pair]
    sets = [tuple(p for p, own in zip(pairs, known, strict=True) if own == value) for value in np.unique(known)]
    turning = tuple(same for same, value in zip(sets, np.unique(known), strict=True) if value != 0)
    return Commutant(width, turning, (*sorted(still), *range(turned, width)))


def refuse_unless_commuting(matrix: np.ndarray, allowed: Commutant) -> None:
    """Raise RecipeError for a matrix that would change scores: one that mixes what turns apart, or mirrors a pair."""
    rest = np.array(matrix, dtype=np.float64)
    largest = float(np.abs(rest).max(initial=0)) or 1.0
    rest[np.ix_(allowed.free, allowed.free)] = 0
    for same in allowed.turning:
        for a, b in same:
            for c, d in same:
                block = rest[np.ix_((a, b), (c, d))]
                allowed_part = (block[0, 0] + block[1, 1] + 1j * (block[1, 0] - block[0, 1])) / 2
                rest[np.ix_((a, b), (c, d))] -= _real(allowed_part)
    if float(np.abs(rest).max(initial=0)) > _FINE * largest:
        at = np.unravel_index(int(np.abs(rest).argmax()), rest.shape)
        raise RecipeError(
            f"a matrix with {matrix[at]:.3g} at {[int(i) for i in at]} does not commute with rotary position "
            "embeddings, and would change what the model computes; scale and turn each pair of entries by itself"
        )


def dense(draw: np.random.Generator, size: int, condition: float) -> np.ndarray:
    """P diag(sigma) S^T with P and S Haar orthogonal and sigma of `scales`: [size, size]."""
    return np.asarray((_haar(draw, size) * scales(draw, size, condition)) @ _haar(draw, size).T)


def scales(draw: np.random.Generator, size: int, condition: float) -> np.ndarray:
    """Positive numbers, log-uniform in [condition^-1/2, condition^1/2]: [size]."""
    reach = np.log(condition) / 2
    return np.exp(draw.uniform(-reach, reach, size))


def _haar(draw: np.random.Generator, size: int) -> np.ndarray:
    q, r = np.linalg.qr(draw.standard_normal((size, size)))
    return np.asarray(q * np.where(np.diag(r) < 0, -1.0, 1.0))


def _complex(draw: np.random.Generator, size: int, condition: float) -> np.ndarray:
    """The same over complex numbers."""
    sides = []
    for _ in range(2):
        q, r = np.linalg.qr(draw.standard_normal((size, size)) + 1j * draw.standard_normal((size, size)))
        sides.append(q * (np.diag(r) / np.abs(np.diag(r))))
    return np.asarray((sides[0] * scales(draw, size, condition)) @ sides[1].conj().T)


def _real(number: complex) -> np.ndarray:
    """a + b i as a I + b J."""
    return np.array([[number.real, -number.imag], [number.imag, number.real]])
