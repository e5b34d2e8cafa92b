"""Singular values of task vectors that are matrices, and how much the experts' singular directions coincide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.pass_ import Pass, State
from weightsmith.ops.spectral import Svd, matrices, svd_of

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.core.site import Site

__all__ = [
    "POINTS",
    "Spectrum",
    "chance",
    "effective_rank",
    "interference",
    "small_enough",
    "spectral_totals",
    "stable_rank",
]

POINTS = 33
"""Places, evenly spaced from the first to the last, at which a spectrum is reported."""


def small_enough(key: Key, side: int) -> bool:
    """Whether a tensor's spectra are measured: a matrix, smaller side 2 .. `side`, at most 16 side^2 entries."""
    return len(key.shape) == 2 and 2 <= min(key.shape) <= side and key.numel <= 16 * side * side


@dataclass(frozen=True)
class Spectrum(Pass["Svd | None"]):
    """All singular triplets above rounding noise of the one expert's matrix; None where it holds NaN or Inf.

    An adapter's task vector stays a product.
    """

    whole: ClassVar[bool] = True
    factored: ClassVar[bool] = True

    def see(self, site: Site) -> State:
        (matrix,) = matrices(site)
        sides = matrix if isinstance(matrix, tuple) else (matrix,)
        if not all(bool(torch.isfinite(side).all()) for side in sides):
            return {}
        found = svd_of(matrix, min(site.block_shape))
        return {name: value.cpu() for name, value in found._asdict().items()}

    def end(self, total: Mapping[str, Any]) -> Svd | None:
        return Svd(**total) if total else None


def effective_rank(s: Tensor) -> float:
    """exp(-sum p_i ln p_i), p_i = s_i / sum s: k for k equal singular values (Roy and Vetterli, 2007).  0 for none."""
    if not len(s):
        return 0.0
    p = s / s.sum()
    return math.exp(-float((p * p.log()).sum()))


def stable_rank(s: Tensor) -> float:
    """|A|_F^2 / |A|_2^2 = sum s_i^2 / s_1^2.  0 for none."""
    return float((s / s[0]).square().sum()) if len(s) else 0.0


def interference(parts: Sequence[Svd]) -> Tensor:
    """(U^T U - I) diag(s) (V^T V - I), [k, k]: U = [U_1 | .. | U_T], V likewise and s put the experts' leading triplets
    side by side.  0 where the experts' row spaces, or their column spaces, are orthogonal to each other.

    The sum of its magnitudes is the singular task interference of Gargiulo et al., "Task Singular Vectors", CVPR 2025.
    """
    u, s, v = (torch.cat([getattr(part, side) for part in parts], -1) for side in ("u", "s", "v"))
    unit = torch.eye(len(s), dtype=s.dtype)
    found: Tensor = ((u.T @ u - unit) * s) @ (v.T @ v - unit)
    return found


def chance(parts: Sequence[Svd]) -> float:
    """The expectation of |interference|_F^2 for independent random directions with the same singular values.

    An entry of U_a^T U_b then has the variance 1/m, one of V_a^T V_b 1/n, and the sum over directions does not mix:
    sum_ab k_a k_b sum_{t not in {a, b}} |s_t|^2 / (m n).

    Squares, not magnitudes: spread over k x k entries, the same interference has a sum of magnitudes up to k times
    larger, so that random directions would seem to interfere more than equal ones.
    """
    m, n = parts[0].u.shape[0], parts[0].v.shape[0]
    energy = [float(part.s.square().sum()) / (m * n) for part in parts]
    total = 0.0
    for a, first in enumerate(parts):
        for b, second in enumerate(parts):
            others = sum(e for t, e in enumerate(energy) if t not in (a, b))
            total += len(first.s) * len(second.s) * others
    return total


def spectral_totals(found: Sequence[Svd], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What adds up over matrices, from each of n experts' triplets on one matrix of this shape (p its smaller side).

    All of `s` is needed, of `u` and `v` only the p // n leading columns.


    spectra.matrices     [n] 1 where the task vector is not zero, else 0, as in all that follow
    spectra.effective    [n] effective rank;  spectra.effective_share: divided by p
    spectra.stable       [n] stable rank
    spectra.kept         [n] share of the sum of squares in the p // n leading triplets, which `tsvm` keeps
    spectra.curve        [n, POINTS] s_i / s_1 at evenly spaced i from 1 to p
    spectra.sti          sum of magnitudes of `interference` of the p // n leading triplets
    spectra.square       its sum of squares;  spectra.chance: what that would be by chance
    """
    p, n = min(shape), len(found)
    lead = [Svd(f.u[:, : p // n], f.s[: p // n], f.v[:, : p // n]) for f in found]
    moved = [part for part in lead if len(part.s)]
    curves = np.zeros((n, POINTS))
    for i, part in enumerate(found):
        if len(part.s):
            padded = np.zeros(p)
            padded[: len(part.s)] = (part.s / part.s[0]).numpy()
            curves[i] = padded[np.linspace(0, p - 1, POINTS).round().astype(int)]
    met = interference(moved) if len(moved) > 1 else torch.zeros(0, 0)
    effective = np.array([effective_rank(f.s) for f in found])
    kept = [
        float(short.s.square().sum() / f.s.square().sum()) if len(f.s) else 0.0
        for short, f in zip(lead, found, strict=True)
    ]
    return {
        "spectra.matrices": np.array([len(f.s) > 0 for f in found], np.int64),
        "spectra.effective": effective,
        "spectra.effective_share": effective / p,
        "spectra.stable": np.array([stable_rank(f.s) for f in found]),
        "spectra.kept": np.array(kept),
        "spectra.curve": curves,
        "spectra.sti": np.array(float(met.abs().sum())),
        "spectra.square": np.array(float(met.square().sum())),
        "spectra.chance": np.array(chance(moved) if len(moved) > 1 else 0.0),
    }
