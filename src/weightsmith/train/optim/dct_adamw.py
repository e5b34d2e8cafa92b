"""AdamW whose moments live in chosen columns of a cosine basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import RecipeError
from weightsmith.train.optim import feedback
from weightsmith.train.optim.bases import Kind
from weightsmith.train.optim.feedback import Feedback
from weightsmith.train.optim.groups import (
    Group,
    LowRankOptimizer,
    check_group,
    gradient,
    is_projected,
    matrix,
    moved,
    projector_of,
)
from weightsmith.train.optim.projector import tall, working

__all__ = ["DCTAdamW", "state_bytes"]


class DCTAdamW(LowRankOptimizer):
    """DCT-AdamW (Modoranu et al., arXiv 2505.17967): low-rank AdamW without an SVD.

    For a matrix parameter with the gradient G, transposed where it is wide, so [n, N] with n >= N; E is what was lost:

        A = G + E
        t = 1 or t mod interval = 0:  S = A Q;  I = the `rank` columns of S of largest norm;  a = S_I
        else:                         a = A Q_I
        E <- A - a Q_I^T
        p <- p (1 - lr weight_decay) - lr AdamW(a) Q_I^T

    params           parameters or param groups; every option below may differ between groups
    lr, betas, eps, weight_decay   as in torch.optim.AdamW; decay is decoupled and acts on all of a group's parameters
    rank             kept directions per matrix, 1 .. N; None makes a group plain AdamW
    basis, norm, fft   how directions are chosen, see `Projector`
    interval         steps between two choices of directions (the authors' `update_proj_gap`)
    rotate           moments follow their direction to its new slot, new directions start at 0.  False leaves moments in
                     their slots although the directions changed, which is what the authors' code does by default
    error_feedback   True keeps what the projection left out and adds it to the next gradient; 8 or 4: in that many bits
    max_size         matrices with a side of at least this (embeddings, heads) get plain AdamW (`max_shape`)

    Vectors get plain AdamW; kernels of convolutions are matrices [out, everything else].  The state is float32
    (float64 for float64 parameters); gradients are only read.  `state_bytes` predicts its size.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None,
        basis: Kind = "dct3",
        norm: int = 1,
        fft: bool = True,
        interval: int = 1,
        rotate: bool = False,
        error_feedback: Feedback = False,
        max_size: int = 32000,
    ) -> None:
        options: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "basis": basis,
        }
        options |= {"norm": norm, "fft": fft, "interval": interval, "rotate": rotate}
        super().__init__(params, {**options, "error_feedback": error_feedback, "max_size": max_size})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        bits = group["error_feedback"]
        if not (isinstance(bits, bool) or bits in (4, 8)):
            raise RecipeError(f"error_feedback must be False, True, 8 or 4, got {bits!r}")
        if group["interval"] < 1:
            raise RecipeError(f"interval must be at least 1, got {group['interval']!r}")
        check_group(group)

    def rate(self, group: Group, projected: bool) -> float:
        return float(group["lr"])

    def project(self, p: Tensor, state: dict[str, Any], group: Group, lr: float) -> None:
        projector = projector_of(group)
        rows = tall(matrix(gradient(p)))  # [n, N]
        self.hold(projector, rows)
        step, bits = int(state["step"]), group["error_feedback"]
        if bits:
            rows = feedback.added(state, rows, bits)
        if step == 1 or step % group["interval"] == 0:
            low, columns = projector.choose(rows)
            if group["rotate"] and "columns" in state:
                _rotate(state, columns, rows.shape[1])
            state["columns"] = columns.to(torch.int32)
        else:
            columns = state["columns"].long()
            low = projector.down(rows, columns)
        if bits:
            projector.add(rows, low, columns, -1.0)
            feedback.save(state, rows, bits)
        if "m" not in state:
            state |= {moment: torch.zeros_like(low, memory_format=torch.contiguous_format) for moment in ("m", "v")}
        direction, length = moved(state["m"], state["v"], low, step, group)
        flat = matrix(p)
        projector.add(flat, direction, columns, -lr * length)
        if flat.data_ptr() != p.data_ptr():  # kernels in another memory format are flattened into a copy
            p.copy_(flat.reshape(p.shape))


def _rotate(state: dict[str, Any], columns: Tensor, size: int) -> None:
    """Carry the moments over to new directions.

    Q_old^T Q_new of orthonormal columns is a 0/1 matching, so the rotation is a gather.
    """
    slots = torch.full((size,), -1, device=columns.device)
    slots[state["columns"].long()] = torch.arange(len(columns), device=columns.device)
    source = slots[columns]  # the old slot of every new direction, -1 for none
    for name in ("m", "v"):
        state[name] = state[name].index_select(1, source.clamp(min=0)) * (source >= 0)


def state_bytes(
    shape: Sequence[int], rank: int | None, *, error_feedback: Feedback = False, dtype: torch.dtype = torch.float32,
    max_size: int = 32000,
) -> int:  # fmt: skip
    """Bytes that DCTAdamW keeps for one parameter of this shape: 2 n rank numbers, rank int32, a step of 4 bytes.

    Plain AdamW where the parameter is not projected: two numbers per entry and the step.
    """
    size, width = torch.Size(shape), working(dtype).itemsize
    if not is_projected(size, {"rank": rank, "max_size": max_size}) or rank is None:
        return 2 * size.numel() * width + 4
    small, large = sorted((size[0], size[1:].numel()))
    return 2 * large * rank * width + 4 * rank + 4 + feedback.bytes_of(large, small, width, error_feedback)
