"""RegMean: closed forms."""

from __future__ import annotations

import pytest
import torch
from driver import merge

from kit import noise, refusal
from weightsmith.core.errors import NumericError
from weightsmith.methods.regmean import Regmean

OUT, IN = 4, 6
WEIGHTS = [noise(OUT, IN, seed=i) for i in range(3)]
INPUTS = [noise(50, IN, seed=10 + i) for i in range(3)]


def gram(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / x.shape[0]


def merged(weights=WEIGHTS, grams=None, **parameters) -> torch.Tensor:
    grams = [gram(x) for x in INPUTS] if grams is None else grams
    models = {f"e{i}": {"w": w} for i, w in enumerate(weights)}
    stats = {f"e{i}": {"gram": {"w": g}} for i, g in enumerate(grams)}
    return merge(models, "regmean", stats=stats, **parameters)["w"]


def test_equal_weights_and_one_model_come_back():
    assert torch.allclose(merged([WEIGHTS[0]] * 3), WEIGHTS[0], atol=1e-6)
    assert torch.allclose(merged(WEIGHTS[:1], [gram(INPUTS[0])]), WEIGHTS[0], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_equal_grams_give_the_mean(alpha):
    got = merged(grams=[gram(INPUTS[0])] * 3, alpha=alpha)
    assert torch.allclose(got, sum(WEIGHTS) / 3, atol=1e-6)


def test_alpha_zero_weighs_each_column_by_its_energy():
    energy = torch.stack([gram(x).diagonal() for x in INPUTS])
    wanted = sum(w * e for w, e in zip(WEIGHTS, energy, strict=True)) / energy.sum(0)
    assert torch.allclose(merged(alpha=0.0), wanted, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_large_layers_agree_with_the_normal_equations_in_float64(ridge):
    """Products in float32, of small differences only; inputs of unlike directions and sizes (a condition of 2e3)."""
    base = noise(256, 260)
    weights = [base + 0.02 * noise(256, 260, seed=i) for i in (1, 2, 3)]
    sizes = torch.logspace(0, -1.5, 260)
    inputs = [noise(900, 260, seed=i) @ noise(260, 260, seed=i + 9) / 16 * sizes for i in (4, 5, 6)]
    grams = [gram(x) for x in inputs]
    got = merged(weights, grams, alpha=0.95, ridge=ridge).double()
    shrunk = [g.double() * 0.95 + torch.diag(g.double().diagonal() * 0.05) for g in grams]
    total = sum(shrunk)
    total = total + torch.eye(260) * (ridge * total.diagonal().mean())
    want = torch.linalg.solve(total, sum(w.double() @ g for w, g in zip(weights, shrunk, strict=True)).T).T
    assert float((got - want).norm() / (want - base).norm()) < 5e-6


def test_models_with_inputs_of_their_own_are_both_reproduced():
    basis = torch.linalg.qr(noise(IN, IN)).Q
    first, second = noise(40, 3) @ basis[:, :3].T, noise(40, 3, seed=1) @ basis[:, 3:].T
    got = merged(WEIGHTS[:2], [gram(first), gram(second)], alpha=1.0)
    for x, w in zip((first, second), WEIGHTS, strict=False):
        assert torch.allclose(x @ got.T, x @ w.T, atol=1e-4)


def test_the_residual_is_least():
    got = merged(alpha=1.0)

    def residual(w: torch.Tensor) -> float:
        return sum(float((x @ (w - v).T).square().mean()) for x, v in zip(INPUTS, WEIGHTS, strict=True))

    assert residual(got) < min(residual(w) for w in [*WEIGHTS, sum(WEIGHTS) / 3])
    gradient = sum((got - w) @ gram(x) for x, w in zip(INPUTS, WEIGHTS, strict=True))
    assert gradient.abs().max() < 1e-5


def test_weights_of_the_models():
    got = merged(WEIGHTS[:2], [gram(INPUTS[0]), gram(INPUTS[1])], weight=(1.0, 3.0))
    assert torch.allclose(got, merged(WEIGHTS[:2], [gram(INPUTS[0]), 3 * gram(INPUTS[1])]), atol=1e-6)
    assert refusal(Regmean(weight=0.0), 2, has_base=False)


def test_layers_stored_the_other_way_round():
    got = merged([w.T.contiguous() for w in WEIGHTS], transposed=True)
    assert torch.allclose(got, merged().T, atol=1e-6)
    assert got.is_contiguous()
    with pytest.raises(NumericError, match=r"w: the Gram matrix has shape \[6, 6\].*wants \[4, 4\]; set transposed"):
        merged([w.T.contiguous() for w in WEIGHTS])


def test_too_few_inputs_are_refused_unless_made_regular():
    few = [gram(x[:1]) for x in INPUTS]
    with pytest.raises(NumericError, match=r"w: the sum of the Gram matrices is singular.*set ridge"):
        merged(grams=few, alpha=1.0)
    assert torch.isfinite(merged(grams=few, alpha=1.0, ridge=1e-3)).all()
    assert torch.isfinite(merged(grams=few, alpha=0.9)).all()


def test_an_input_that_is_always_zero_gets_the_mean():
    dead = [x.clone() for x in INPUTS]
    for x in dead:
        x[:, 2] = 0
    got = merged(grams=[gram(x) for x in dead], alpha=1.0)
    assert torch.allclose(got[:, 2], sum(WEIGHTS)[:, 2] / 3, atol=1e-6)
    rest = [i for i in range(IN) if i != 2]
    alone = merged([w[:, rest].contiguous() for w in WEIGHTS], [gram(x[:, rest]) for x in dead], alpha=1.0)
    assert torch.allclose(got[:, rest], alone, atol=1e-5)


def test_tensors_without_a_gram_get_the_mean():
    models = {f"e{i}": {"w": w, "b": w[0], "e": w} for i, w in enumerate(WEIGHTS)}
    stats = {f"e{i}": {"gram": {"w": gram(x), "b": gram(x)}} for i, x in enumerate(INPUTS)}
    got = merge(models, "regmean", stats=stats)
    assert torch.allclose(got["b"], sum(WEIGHTS)[0] / 3, atol=1e-6)
    assert torch.allclose(got["e"], sum(WEIGHTS) / 3, atol=1e-6)


def test_broken_grams_are_refused():
    for bad in (float("nan"), -1.0):
        broken = [gram(x) for x in INPUTS]
        broken[1][2, 2] = bad
        with pytest.raises(NumericError, match="w: a Gram matrix has negative diagonal entries or is not finite"):
            merged(grams=broken)
