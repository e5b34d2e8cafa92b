"""Whether task vectors keep to their own data, and the kernel that decides it (arXiv:2305.12827)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from weightsmith.core.errors import NumericError, RecipeError
from weightsmith.observe.tangent import Delta, Linearized, Pick, logits_of

__all__ = ["disentanglement_error", "disentanglement_map", "local_energy", "ntk"]

_HELD = 1 << 28  # entries of Jacobians held at once


def disentanglement_error(
    model: nn.Module, vectors: Sequence[Delta], data: Sequence[Sequence[Tensor]], alphas: Sequence[float], **how: Any
) -> float:
    """xi(alpha) = sum over tasks t of E_{x of t} [f(x; theta_0 + alpha_t tau_t) and f(x; joint edit) disagree].

    model   a network at theta_0, or a `Linearized` one;  vectors: a task vector for each task
    data    of each task some batches of inputs;  alphas: a coefficient for each task
    how     pick: see `tangent.linearize`
    Disagreement is of the largest output: the result is between 0 and the number of tasks.
    """
    if not len(vectors) == len(data) == len(alphas):
        raise RecipeError(f"{len(vectors)} task vectors, {len(data)} sets of data and {len(alphas)} coefficients")
    total = 0.0
    for task, batches in enumerate(data):
        alone = [a if t == task else 0.0 for t, a in enumerate(alphas)]
        wrong = count = 0
        for batch in batches:
            run = _edits(model, vectors, batch, **how)
            answers = [run(each).argmax(-1) for each in (alone, alphas)]
            wrong += int((answers[0] != answers[1]).sum())
            count += answers[0].numel()
        total += wrong / count
    return total


def disentanglement_map(
    model: nn.Module,
    vectors: Sequence[Delta],
    data: Sequence[Sequence[Tensor]],
    grid: Sequence[float] = tuple(np.linspace(-3, 3, 20)),
    **how: Any,
) -> np.ndarray:
    """xi over a grid of both coefficients of two tasks: [grid, grid], the first task's along the rows.

    A linearised model needs one forward-mode pass for each vector and batch, an ordinary one a pass for each point.
    """
    if len(vectors) != 2:
        raise RecipeError(f"a map is of two tasks, not of {len(vectors)}")
    found = np.zeros((len(grid), len(grid)))
    for task, batches in enumerate(data):
        count = 0
        wrong = np.zeros_like(found)
        for batch in batches:
            run = _edits(model, vectors, batch, **how)
            alone = [run([a, 0.0] if task == 0 else [0.0, a]).argmax(-1) for a in grid]
            count += alone[0].numel()
            for i, a in enumerate(grid):
                for j, b in enumerate(grid):
                    own = alone[i if task == 0 else j]
                    wrong[i, j] += int((run([a, b]).argmax(-1) != own).sum())
        found += wrong / count
    return found


def _edits(
    model: nn.Module, vectors: Sequence[Delta], batch: Tensor, pick: Pick = logits_of
) -> Callable[[Sequence[float]], Tensor]:
    """coefficients -> the outputs for a batch of the model that they make."""
    with torch.no_grad():
        if isinstance(model, Linearized):
            terms = [model.terms(vector, batch) for vector in vectors]
            return lambda alphas: terms[0][0] + sum(a * d for a, (_, d) in zip(alphas, terms, strict=True))
        start = {name: p.detach() for name, p in model.named_parameters()}

    def run(alphas: Sequence[float]) -> Tensor:
        placed = dict(start)
        for alpha, vector in zip(alphas, vectors, strict=True):
            if alpha:
                placed |= {name: placed[name] + alpha * change.to(placed[name]) for name, change in vector.items()}
        with torch.no_grad():
            return pick(functional_call(model, placed, (batch,)))

    return run


# --- the neural tangent kernel ---------------------------------------------------------------------


def ntk(model: nn.Module, inputs: Tensor, outputs: int | None = None, pick: Pick = logits_of) -> Tensor:
    """The empirical kernel K(x, x') = J(x) J(x')^T: [n, n] float64, of the sum of outputs or of one of them.

    inputs: [n, ...], one example each.  Gradients are taken example by example and held in tiles, so that memory
    stays bounded; n of a few hundred is meant.  Raises NumericError for gradients that are no numbers.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    wanted = [p.requires_grad for p in parameters]
    size = sum(p.numel() for p in parameters)
    step = max(1, _HELD // (2 * size))
    found = torch.zeros(len(inputs), len(inputs), dtype=torch.float64)
    try:
        for p in parameters:
            p.requires_grad_()
        for low in range(0, len(inputs), step):
            left = _jacobian(model, inputs[low : low + step], outputs, parameters, pick)
            for other in range(low, len(inputs), step):
                right = (
                    left if other == low else _jacobian(model, inputs[other : other + step], outputs, parameters, pick)
                )
                found[low : low + step, other : other + step] = left @ right.T
    finally:
        for p, before in zip(parameters, wanted, strict=True):
            p.requires_grad_(before)
    if not bool(torch.isfinite(found).all()):
        raise NumericError("a gradient of the network is no finite number; no kernel can be made of it")
    return found.triu() + found.triu(1).T


def _jacobian(
    model: nn.Module, inputs: Tensor, outputs: int | None, parameters: Sequence[nn.Parameter], pick: Pick
) -> Tensor:
    """[examples, parameters] float64."""
    rows = []
    for example in inputs:
        value = pick(model(example[None]))
        scalar = value.sum() if outputs is None else value[..., outputs].sum()
        grads = torch.autograd.grad(scalar, parameters, allow_unused=True)
        flat = [
            torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)
        ]
        rows.append(torch.cat(flat).double())
    return torch.stack(rows)


def local_energy(gram: Tensor, count: int) -> Tensor:
    """E(x) = sum of squares of the `count` leading eigenfunctions of a kernel at every example: [n], mean count / n.

    A task vector built of eigenfunctions with all their energy on one task's data leaves other tasks alone.
    """
    if not 1 <= count <= len(gram):
        raise RecipeError(f"{count} eigenfunctions of a kernel over {len(gram)} examples")
    vectors: Tensor = torch.linalg.eigh(gram.double()).eigenvectors
    return vectors[:, -count:].square().sum(1)
