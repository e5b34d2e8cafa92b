"""Tangent models: exact where the network is linear, additive, right to second order; kernels against Jacobians."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

from weightsmith.align.disentangle import disentanglement_error, disentanglement_map, local_energy, ntk
from weightsmith.core.errors import NumericError, RecipeError, SourceError, WeightsmithError
from weightsmith.observe.tangent import advantage, linearize


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def vector(module: nn.Module, seed: int, scale: float = 0.3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in module.named_parameters()}


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def outputs(module: nn.Module, delta: dict[str, Tensor], alpha: float, x: Tensor = X) -> Tensor:
    placed = {n: p.detach() + alpha * delta[n] for n, p in module.named_parameters()}
    return torch.func.functional_call(module.eval(), placed, (x,))


def test_a_linear_network_is_its_own_tangent() -> None:
    module = nn.Linear(4, 3).double()
    lin, delta = linearize(module, X), vector(module, 1)
    lin.load_delta(delta)
    assert torch.allclose(lin(X), outputs(module, delta, 1.0), atol=1e-12)


def test_at_the_origin_values_and_gradients_are_the_networks() -> None:
    module = net()
    lin = linearize(module, X).train()
    assert torch.equal(lin(X), module.eval()(X))
    lin(X).square().sum().backward()
    module(X).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(lin.theta[name.replace(".", "|")].grad, parameter.grad, atol=1e-10)  # type: ignore[arg-type]
    assert all(p.grad is None for p in lin.origin.parameters())


def test_outputs_add_and_differ_from_the_network_by_second_order() -> None:
    module = net()
    lin, a, b = linearize(module), vector(module, 1), vector(module, 2)
    start = module.eval()(X)
    both = {n: 0.7 * a[n] - 1.3 * b[n] for n in a}
    parts = [lin.terms(v, X)[1] for v in (a, b, both)]
    assert torch.allclose(0.7 * parts[0] - 1.3 * parts[1], parts[2], atol=1e-10)
    errors = [(outputs(module, a, eps) - start - eps * parts[0]).norm().item() for eps in (1e-2, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)


def test_a_sweep_is_one_pass_for_all_coefficients() -> None:
    module = net()
    lin, delta = linearize(module), vector(module, 1)
    alphas = np.linspace(0, 1, 21).tolist()
    found = lin.sweep(delta, alphas, X)
    assert found.shape == (21, 16, 3)
    for alpha, rows in zip(alphas, found, strict=True):
        lin.load_delta({n: alpha * d for n, d in delta.items()})
        assert torch.allclose(lin(X), rows, atol=1e-10)


def test_training_moves_theta_alone(tmp_path: Any) -> None:
    module = net()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    lin = linearize(module)
    step = torch.optim.AdamW(lin.theta.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (lin(X) - X[:, :3]).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert all(torch.equal(p, before[n]) for n, p in lin.origin.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    torch.save(lin.state_dict(), tmp_path / "lin.pt")
    again = linearize(net(3))
    again.load_state_dict(torch.load(tmp_path / "lin.pt", weights_only=True))
    assert torch.equal(again(X), lin(X))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_language_models(family: str) -> None:
    """Kernels without forward mode are switched; a tied weight has one tangent; figures against differences."""
    torch.manual_seed(0)
    module = FAMILIES[family]().double().eval()
    ids = torch.arange(2, 20).reshape(2, 9)
    lin, delta = linearize(module, ids), vector(module, 1, 0.02)
    assert "attention" in lin.switched
    assert ("experts" in lin.switched) == (family == "mixtral")
    _, change = lin.terms(delta, ids)
    names = dict(module.named_parameters())
    ends = []
    for sign in (1, -1):
        placed = {n: p.detach() + sign * 3e-3 * delta[n] for n, p in names.items()}
        ends.append(torch.func.functional_call(lin.origin, placed, (ids,)).logits)
    error = (ends[0] - ends[1]) / 6e-3 - change  # norms are in float32 inside
    assert float(error.norm() / change.norm()) < 1e-3


class _NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * grad


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _NoForward.apply(x)  # type: ignore[no-any-return]


def test_a_module_without_forward_mode_is_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), Odd()), nn.Linear(4, 2)).double()
    with pytest.raises(SourceError, match=r"1\.1 has no forward-mode differentiation, so it cannot be linearised"):
        linearize(module, X)


def test_vectors_of_other_networks_are_refused() -> None:
    lin = linearize(net())
    with pytest.raises(SourceError, match=r"the network has no parameter '0\.weigth'; did you mean '0\.weight'"):
        lin.load_delta({"0.weigth": torch.zeros(8, 4)})
    with pytest.raises(SourceError, match=r"0\.weight is \[4, 8\] in the task vector, \[8, 4\] in the network"):
        lin.terms({"0.weight": torch.zeros(4, 8)}, X)


def test_disentanglement() -> None:
    module = net().eval()
    lin, vectors = linearize(module), [vector(module, s, 1.0) for s in (1, 2)]
    data = [[X[:8], X[8:12]], [X[12:]]]
    grid = (-1.0, 0.0, 0.5, 2.0)
    for model in (module, lin):
        found = disentanglement_map(model, vectors, data, grid)
        assert found.shape == (4, 4)
        assert 0 <= found.min() <= found.max() <= 2
        assert found.max() > 0
        assert found[1, 1] == 0  # no edit at all
        assert found[2, 3] == pytest.approx(disentanglement_error(model, vectors, data, (0.5, 2.0)))
    nothing = {n: torch.zeros_like(v) for n, v in vectors[0].items()}
    assert not disentanglement_map(module, [nothing, nothing], data, grid).any()
    with pytest.raises(RecipeError, match="a map is of two tasks, not of 1"):
        disentanglement_map(module, vectors[:1], data[:1], grid)
    with pytest.raises(RecipeError, match="2 task vectors, 2 sets of data and 1 coefficients"):
        disentanglement_error(module, vectors, data, (0.5,))


@pytest.mark.parametrize("outputs", [None, 1])
def test_the_kernel_is_that_of_jacobians(outputs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = net().eval()
    found = ntk(module, X[:6], outputs)
    names = dict(module.named_parameters())

    def value(placed: dict[str, Tensor], x: Tensor) -> Tensor:
        out = torch.func.functional_call(module, placed, (x[None],))
        return out.sum() if outputs is None else out[0, outputs]

    rows = [torch.func.grad(value)({n: p.detach() for n, p in names.items()}, x) for x in X[:6]]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows])
    assert torch.allclose(found, jacobian @ jacobian.T, atol=1e-10)
    assert torch.equal(found, found.T)
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-10
    monkeypatch.setattr("weightsmith.align.disentangle._HELD", 1)  # one example at a time
    assert torch.allclose(ntk(module, X[:6], outputs), found, atol=1e-12)
    energy = local_energy(found, 2)
    assert float(energy.sum()) == pytest.approx(2)
    assert local_energy(torch.diag(torch.tensor([1.0, 5.0, 3.0])), 1).tolist() == [0, 1, 0]
    with pytest.raises(RecipeError, match="7 eigenfunctions of a kernel over 6 examples"):
        local_energy(found, 7)
    with pytest.raises(NumericError, match="no kernel can be made of it"):
        ntk(module, X[:2] * torch.inf)


def test_what_linearising_costs() -> None:
    assert advantage(0.4, 0.2, 5) == pytest.approx(0.25)
    with pytest.raises(WeightsmithError, match="two classes or more, not 1"):
        advantage(0.1, 0.1, 1)
