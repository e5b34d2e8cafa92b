"""Least squares of partly merged layers: exact cases, against gradient descent, and the zeros that must stay."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from kit import noise
from weightsmith.align.leastsquares import Mode, Normal
from weightsmith.align.partial import Split, expanded, split
from weightsmith.core.errors import NumericError

N, OUT, ROWS = 8, 6, 200


def halves(n: int, ratio: float, seed: int = 0) -> Split:
    draw = np.random.default_rng(seed)
    return split(draw.standard_normal((n, n)), draw.permutation(n), ratio)


def layers(columns: Split | None, rows: Split | None, mode: Mode = "averaged") -> tuple[Normal, list[torch.Tensor]]:
    """Sums over four batches, and both models' weights."""
    weights = [noise(OUT, N, seed=s, dtype=torch.float64) for s in (1, 2)]
    made = Normal(rows, columns, mode)
    for batch in range(4):
        x = noise(ROWS, N, seed=10 + batch), noise(ROWS, N, seed=20 + batch)
        made.add(x, (x[0] @ weights[0].T.float() + 0.5, x[1] @ weights[1].T.float() - 0.25))
    return made, weights


def test_a_permuted_copy_gives_the_layer_back() -> None:
    columns, rows = halves(N, 0.0), halves(OUT, 0.0, 1)
    weight, bias, x = noise(OUT, N, dtype=torch.float64), noise(OUT, seed=3, dtype=torch.float64), noise(ROWS, N)
    into, out = (torch.from_numpy(np.argsort(s.merged[1])) for s in (columns, rows))
    made = Normal(rows, columns)
    y = x.double() @ weight.T + bias
    made.add((x, x[:, into]), (y, y[:, out]))
    fit = made.solve(ridge=0)
    assert torch.allclose(fit.weight, weight, atol=1e-9)
    assert torch.allclose(fit.bias, bias, atol=1e-9)
    assert fit.rank is None
    assert made.loss(fit.weight, fit.bias) < 1e-10


@pytest.mark.parametrize("mode", ["averaged", "separate"])
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.5, 0.4), (1.0, 1.0), (None, 0.5), (0.5, None)])
def test_no_weights_do_better(shares: tuple[float | None, float | None], mode: Mode) -> None:
    columns, rows = (None if s is None else halves(n, s, n) for n, s in zip((N, OUT), shares, strict=True))
    made, weights = layers(columns, rows, mode)
    fit = made.solve(ridge=1e-12)
    reached = made.loss(fit.weight, fit.bias)
    assert reached <= made.loss(expanded(weights[0], weights[1], rows, columns)) + 1e-9
    allowed = expanded(torch.ones(OUT, N), torch.ones(OUT, N), rows, columns) != 0
    assert not fit.weight[~allowed].any()
    for i in range(5):
        step = 1e-3 * noise(*fit.weight.shape, seed=i, dtype=torch.float64) * allowed
        assert made.loss(fit.weight + step, fit.bias) > reached


def test_gradient_descent_gets_there() -> None:
    columns, rows = halves(N, 0.5), halves(OUT, 0.4, 1)
    made, weights = layers(columns, rows)
    fit = made.solve(ridge=1e-12)
    start = expanded(weights[0], weights[1], rows, columns)
    allowed = expanded(torch.ones(OUT, N), torch.ones(OUT, N), rows, columns) != 0
    w, b = start.clone().requires_grad_(), torch.zeros(len(start), dtype=torch.float64, requires_grad=True)
    gram, cross = made._sums()
    losses = []
    for step in range(2000):
        full = torch.cat([w * allowed, b[:, None]], 1)
        loss = (((full @ gram) * full).sum() - 2 * (full * cross.T).sum()) / made.count
        grads = torch.autograd.grad(loss, (w, b))
        with torch.no_grad():
            w -= 0.3 * grads[0]
            b -= 0.3 * grads[1]
        if step % 500 == 0:
            losses.append(float(loss.detach()))
    assert all(later <= earlier for earlier, later in pairwise(losses))
    assert torch.allclose((w * allowed).detach(), fit.weight, atol=1e-4)
    assert torch.allclose(b.detach(), fit.bias, atol=1e-4)


def test_fewer_rows_than_columns_are_said() -> None:
    made = Normal(None, None)
    x, y = noise(3, N), noise(3, OUT, seed=1)
    made.add((x, x), (y, y))
    fit = made.solve()
    assert fit.rank == 3
    assert bool(torch.isfinite(fit.weight).all())
    assert made.loss(fit.weight, fit.bias) < 1e-3


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(NumericError, match="nothing was added"):
        Normal(None, None).solve()
    made = Normal(None, None)
    x = noise(3, N)
    x[0, 0] = torch.nan
    made.add((x, x), (noise(3, OUT), noise(3, OUT)))
    with pytest.raises(NumericError, match="hold NaN or Inf"):
        made.solve()
