"""The straightforward way to methods that take steps or filter a spectrum, as their authors' code does it.

Signatures as in `bench.plain`: task vectors [n, out, in], base and statistic, float32; gradients come from autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["aswudi", "doge", "optmerge", "swudi", "wudi"]


def doge(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """Whole SVDs for the shared space, 400 steps of Adam, a sort for each mask."""
    norms = deltas.flatten(1).norm(dim=1)
    factors = (0.07 / norms)[:, None, None]
    smaller = min(base.shape)
    lefts = [torch.linalg.svd(d, full_matrices=False).U[:, : smaller // len(deltas)] for d in deltas]
    shared = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False).U[:, : smaller // 6]
    summed = (factors * deltas).sum(0)

    def loss(delta: Tensor) -> Tensor:
        return (deltas * (deltas - summed - factors.sum() * delta)).sum(2).square().sum()

    delta = _adam(loss, torch.zeros_like(base), 400, 1e-4, lambda g: g - shared @ (shared.T @ g))
    flat = deltas.flatten(1).abs()
    size = flat.shape[1]
    cut = flat.kthvalue(size - int(size * 0.3), dim=1).values
    kept = deltas.abs() >= cut[:, None, None]
    return base + (factors * kept * (deltas + delta)).sum(0)


def wudi(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """300 steps of Adam, with two products of matrices for every task in each."""
    norms = deltas.flatten(1).square().sum(1)

    def loss(merged: Tensor) -> Tensor:
        return (((merged - deltas) @ deltas.transpose(1, 2)).square().sum((1, 2)) / norms).sum()

    return base + _adam(loss, deltas.sum(0), 300, 1e-5)


def optmerge(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    """Two whole SVDs for every task, then the same steps."""
    rank, mean = min(base.shape) // len(deltas), deltas.mean(0)
    norms = deltas.flatten(1).square().sum(1)
    targets, projectors = [], []
    for delta in deltas:
        _u, s, v = torch.linalg.svd(delta, full_matrices=False)
        projectors.append(s[:rank, None] * v[:rank])
        u, s, v = torch.linalg.svd(delta - mean, full_matrices=False)
        targets.append(mean + (u[:, :rank] * s[:rank]) @ v[:rank])
    target, seen = torch.stack(targets), torch.stack(projectors).transpose(1, 2)

    def loss(merged: Tensor) -> Tensor:
        return (((merged - target) @ seen).square().sum((1, 2)) / norms).sum()

    return base + _adam(loss, deltas.sum(0), 300, 1e-5)


def swudi(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    values, vectors, pull = _spectrum(deltas)
    count = int(base.shape[1] * 0.65 + 0.999)
    gain = torch.where(torch.arange(len(values)) < count, 1 - torch.exp(-values * 300.0), 0.0)
    return base + _filtered(deltas.sum(0), values, vectors, pull, gain)


def aswudi(deltas: Tensor, base: Tensor, _: Tensor | None) -> Tensor:
    values, vectors, pull = _spectrum(deltas)
    roots = values.sqrt()
    count = math.ceil(roots.sum().square() / roots.square().sum())
    gain = (torch.arange(len(values)) < count).to(values)
    return base + _filtered(deltas.sum(0), values, vectors, pull, gain)


def _spectrum(deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of C, falling, its eigenvectors, and D, as `weightsmith methods swudi` defines them."""
    grams = deltas.transpose(1, 2) @ deltas / deltas.flatten(1).square().sum(1)[:, None, None]
    values, vectors = torch.linalg.eigh(grams.sum(0))
    return values.flip(0).clamp(min=1e-8), vectors.flip(1), (deltas @ grams).sum(0)


def _filtered(start: Tensor, values: Tensor, vectors: Tensor, pull: Tensor, gain: Tensor) -> Tensor:
    return start - ((start @ vectors) * gain) @ vectors.T + ((pull @ vectors) * (gain / values)) @ vectors.T


def _adam(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int,
    lr: float,
    project: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """torch's own Adam over autograd; `project` changes every gradient."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(x).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        x.grad = project(x.grad)
        optimizer.step()
    return x.detach()
