"""The factors by themselves: spectra, identical layers, growth, MiniCache's formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weightsmith.runtime.shared import LowRank, Rule, Slerp


def states(layers: int, tokens: int = 120, width: int = 24, batch: int = 1, seed: int = 0) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, width)
    return [torch.randn(batch, tokens, width, generator=noise) * scale for _ in range(layers)]


def rebuilt(found: LowRank | Slerp) -> Tensor:
    layers = len(found.e) if isinstance(found, LowRank) else 2
    return torch.cat([found.rows(layer, 0, found.tokens) for layer in range(layers)], 2)


def test_the_error_is_the_tail_of_the_spectrum_and_no_basis_has_less() -> None:
    x = states(3)
    joined = torch.cat(x, 2)[0]
    found = LowRank.of(x, Rule(rank=10))
    assert found is not None
    error = float((rebuilt(found)[0] - joined).norm())
    s = torch.linalg.svdvals(joined.double())
    assert math.isclose(error, float(s[10:].norm()), rel_tol=1e-5)
    for seed in range(5):
        random = torch.randn(120, 10, generator=torch.Generator().manual_seed(seed))
        for basis in (random, x[seed % 3][0][:, :10], torch.linalg.svd(x[seed % 3][0]).U[:, :10]):
            q = torch.linalg.qr(basis).Q
            assert float((joined - q @ (q.T @ joined)).norm()) >= error


def test_identical_layers_cost_no_more_than_one() -> None:
    (one,) = states(1)
    single, three = LowRank.of([one], Rule(rank=6)), LowRank.of([one, one, one], Rule(rank=6))
    assert single is not None
    assert three is not None
    for layer in range(3):
        assert torch.allclose(three.rows(layer, 0, 120), single.rows(0, 0, 120), atol=1e-5)


def test_energy_takes_the_fewest_and_joint_bases_need_fewer_than_separate_ones() -> None:
    (one,) = states(1)
    x = [one + 0.2 * other for other in states(4, seed=1)]
    found = LowRank.of(x, Rule(energy=0.9))
    assert found is not None
    squares = torch.linalg.svdvals(torch.cat(x, 2)[0].double()).square()
    rank = found.p.shape[2]
    assert float(squares[:rank].sum()) >= 0.9 * float(squares.sum()) > float(squares[: rank - 1].sum())
    separate = [LowRank.of([layer], Rule(energy=0.9, always=True)) for layer in x]
    assert rank < sum(part.p.shape[2] for part in separate if part is not None)


def test_growing_equals_fitting_all_at_a_full_rank() -> None:
    x = states(2, tokens=200, batch=3)
    rule = Rule(rank=48, always=True)
    found = LowRank.of([layer[:, :90] for layer in x], rule)
    assert found is not None
    grown = found.grown([layer[:, 90:] for layer in x], rule)
    assert grown is not None
    assert torch.allclose(rebuilt(grown), torch.cat(x, 2), atol=1e-4)
    # At a lower rank: as good as the best of what is left of the first part and of the second.
    low = LowRank.of([layer[:, :90] for layer in x], Rule(rank=8))
    assert low is not None
    both = [torch.cat([low.rows(i, 0, 90), layer[:, 90:]], 1) for i, layer in enumerate(x)]
    want, got = LowRank.of(both, Rule(rank=8)), low.grown([layer[:, 90:] for layer in x], Rule(rank=8))
    assert want is not None
    assert got is not None
    assert torch.allclose(rebuilt(got), rebuilt(want), atol=1e-4)


def test_padding_changes_nothing() -> None:
    x = states(2)
    padded = [torch.cat([torch.zeros(1, 30, 24), layer], 1) for layer in x]
    alone, beside = LowRank.of(x, Rule(rank=7)), LowRank.of(padded, Rule(rank=7))
    assert alone is not None
    assert beside is not None
    assert torch.allclose(rebuilt(beside)[:, 30:], rebuilt(alone), atol=1e-5)
    assert not bool(rebuilt(beside)[:, :30].any())


def test_sums_of_values_are_those_of_the_rebuilt_ones() -> None:
    x = states(2, tokens=90, batch=2)
    weights = torch.rand(2, 3, 4, 90)
    for found in (LowRank.of(x, Rule(rank=9)), Slerp.of(x, heads=3)):
        assert found is not None
        for layer in range(2):
            rows = found.rows(layer, 0, 90).view(2, 90, 3, 8).transpose(1, 2)
            assert torch.allclose(found.weighted(layer, weights, 3), weights @ rows, atol=1e-4)


def test_sequences_are_chosen() -> None:
    x, index = states(2, batch=3), torch.tensor([2, 2, 0])
    for found in (LowRank.of(x, Rule(rank=9)), Slerp.of(x, heads=3)):
        assert found is not None
        assert torch.equal(rebuilt(found.taken(index)), rebuilt(found)[index])


def test_minicache_is_the_spherical_mean_with_each_layers_norm() -> None:
    x = states(2, tokens=60, batch=2)
    found = Slerp.of(x, heads=3)
    one, two = (layer.reshape(-1, 8).double() for layer in x)
    u, v = (y / y.norm(dim=1, keepdim=True) for y in (one, two))
    angle = (u * v).sum(1, keepdim=True).acos()
    mean = ((angle / 2).sin() / angle.sin()) * (u + v)
    near = angle <= angle.min() + 0.05 * (angle.max() - angle.min())
    for layer, y in enumerate((one, two)):
        want = torch.where(near, y, mean * y.norm(dim=1, keepdim=True))
        assert torch.allclose(found.rows(layer, 0, 60).reshape(-1, 8).double(), want, atol=1e-5)
    grown = Slerp.of([layer[:, :60] for layer in x], heads=3).grown([2 * layer for layer in x], Rule())
    assert torch.allclose(grown.rows(1, 60, 120), 2 * found.rows(1, 0, 60), atol=1e-5)
