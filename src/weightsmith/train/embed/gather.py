"""Embeddings of all ranks, with gradients back to the rank that each came from."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from weightsmith.core.errors import PlanError

__all__ = ["first_row", "gather"]


def gather(tensor: Tensor) -> Tensor:
    """The rows of all ranks, in their order: [n, ...] -> [ranks n, ...]; the tensor itself without a process group.

    Each rank gets the sum of all ranks' gradients of its rows.  DistributedDataParallel then averages over ranks, so
    the mean of the ranks' losses is differentiated exactly.  Every rank must have the same shape.
    """
    if not _ranks() > 1:
        return tensor
    shape = torch.tensor([*tensor.shape, tensor.ndim], device=tensor.device)
    shapes = [torch.empty_like(shape) for _ in range(_ranks())]
    dist.all_gather(shapes, shape)
    if any(not torch.equal(other, shape) for other in shapes):
        rows = ", ".join(str(int(other[0])) for other in shapes)
        raise PlanError([f"gathering embeddings needs equal batches on all ranks, got {rows} rows"])
    found: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
    return found


def first_row(rows: int) -> int:
    """Where this rank's rows begin in what `gather` gives."""
    return dist.get_rank() * rows if _ranks() > 1 else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(_ranks())]
        dist.all_gather(parts, tensor)
        ctx.rows = len(tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[first_row(ctx.rows) :][: ctx.rows]
