"""Muon on chosen columns of a cosine basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.train.optim.bases import Kind
from weightsmith.train.optim.groups import (
    Group,
    LowRankOptimizer,
    check_group,
    gradient,
    matrix,
    projector_of,
)
from weightsmith.train.optim.projector import tall

__all__ = ["Trion", "newton_schulz"]

SCALES: Mapping[str, Callable[[int, int], float]] = {
    "original": lambda out, into: sqrt(max(1.0, out / into)),
    "match_rms_adamw": lambda out, into: 0.2 * sqrt(max(out, into)),
    "dion": lambda out, into: sqrt(out / into),
    "none": lambda out, into: 1.0,
}
"""Length of the update of a matrix [out, in]; the authors call them kj, kimi, dion and none."""


class Trion(LowRankOptimizer):
    """Trion (Modoranu et al., arXiv 2505.17967): the low-rank momentum, orthogonalised.

    For a matrix parameter with the gradient G, transposed where it is wide, so [n, N] with n >= N:

        M <- M + G;  S = M Q;  I = the `rank` columns of S of largest norm;  m = S_I
        M <- M - (1 - momentum) m Q_I^T
        p <- p (1 - lr weight_decay) - lr scale NewtonSchulz(m) Q_I^T

    lr, momentum, weight_decay   of matrices
    rank             kept directions, 1 .. N; None makes a group plain AdamW
    scale            "original", "match_rms_adamw", "dion" or "none", see `SCALES`
    basis, norm, fft   how directions are chosen, see `Projector`
    adam_lr, betas, eps   plain AdamW for vectors, for matrices with a side of at least `max_size`, and for groups with
                     rank None

    The published code does not run as it is (names are missing), so no reference output stands behind this class; its
    formulae do, and it uses one basis for wide and tall matrices where that code transposes it for wide ones.
    The momentum is full-size float32 (float64 for float64 parameters); gradients are only read.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        rank: int | None,
        scale: Literal["original", "match_rms_adamw", "dion", "none"] = "original",
        basis: Kind = "dct3",
        norm: int = 1,
        fft: bool = True,
        max_size: int = 32000,
        adam_lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ) -> None:
        options: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rank": rank,
            "scale": scale,
        }
        options |= {"basis": basis, "norm": norm, "fft": fft, "max_size": max_size}
        super().__init__(params, {**options, "adam_lr": adam_lr, "betas": betas, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["scale"] not in SCALES:
            raise RecipeError(f"unknown scale {group['scale']!r}{did_you_mean(str(group['scale']), SCALES)}")
        if not 0 <= group["momentum"] < 1:
            raise RecipeError(f"momentum must be in [0, 1), got {group['momentum']!r}")
        check_group(group)

    def rate(self, group: Group, projected: bool) -> float:
        return float(group["lr"] if projected else group["adam_lr"])

    def project(self, p: Tensor, state: dict[str, Any], group: Group, lr: float) -> None:
        projector, rows = projector_of(group), tall(matrix(gradient(p)))  # [n, N]
        self.hold(projector, rows)
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix(p), dtype=rows.dtype, memory_format=torch.contiguous_format)
        kept = tall(state["momentum"]).add_(rows)
        low, columns = projector.choose(kept)
        projector.add(kept, low, columns, group["momentum"] - 1)
        flat = matrix(p)
        projector.add(flat, newton_schulz(low), columns, -lr * SCALES[group["scale"]](*flat.shape))
        if flat.data_ptr() != p.data_ptr():  # kernels in another memory format are flattened into a copy
            p.copy_(flat.reshape(p.shape))


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of a matrix [n, k] near 1 (0.7 to 1.2): its dtype, [n, k].

    X <- a X + (b X X^T + c (X X^T)^2) X with (3.4445, -4.7750, 2.0315), from X / |X| (Jordan et al. 2024).  Every step
    multiplies X by a polynomial of its Gram matrix, so all of them are taken on that smaller matrix: two products of
    size n instead of three a step.  Muon takes them in bfloat16, which a Gram matrix is too coarse in.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T  # [k, k]
    product = torch.eye(len(gram), dtype=x.dtype, device=x.device)
    for _ in range(steps):
        turn = b * gram + c * gram @ gram
        turn.diagonal().add_(a)
        product = turn @ product
        gram = turn @ gram @ turn  # all are polynomials of one matrix, so they commute
    found: Tensor = product @ x
    return found if matrix.shape[0] <= matrix.shape[1] else found.T
