"""WIDEN: closed forms."""

from __future__ import annotations

import pytest
import torch
from driver import merge
from torch import Tensor

from kit import noise, refusal
from weightsmith.methods.widen import Widen, _changes


def widen(
    base: Tensor, *experts: Tensor, name: str = "up_proj.weight", t: float = 1.0, s: float = 1.0, **more
) -> Tensor:
    models = {f"e{i}": {name: e} for i, e in enumerate(experts)}
    return merge(
        models, "widen", base={name: base}, above_average_value_ratio=t, score_calibration_value=s, **more
    )[name]  # fmt: skip


BASE = noise(6, 10)


@pytest.mark.parametrize("shape", [(6, 10), (10,), (4, 3, 2), ()])
def test_one_model_comes_back(shape):
    base, change = noise(*shape, seed=1), 0.1 * noise(*shape, seed=2)
    assert torch.allclose(widen(base, base + change), base + change, atol=1e-6)


def test_twins_are_added_where_important_and_averaged_elsewhere():
    change = 0.1 * noise(6, 10, seed=3)
    got = (widen(BASE, BASE + change, BASE + change) - BASE) / change
    factors = got.mean(0)
    assert torch.allclose(got, factors.expand(6, 10), atol=1e-3)
    # Halves of 0.5 (softmax) and 1 (important) from either ranking.
    assert torch.allclose(factors * 2, (factors * 2).round(), atol=1e-3)
    assert {round(float(f), 1) for f in factors} == {1.0, 1.5, 2.0}
    assert round(float(factors.sum())) == 15  # either ranking finds 5 of 10 columns important


def test_without_importance_the_scores_of_a_column_sum_to_one():
    change = 0.1 * noise(6, 10, seed=3)
    got = widen(BASE, BASE + change, BASE + change, BASE + change, t=1e9)
    assert torch.allclose(got, BASE + change, atol=1e-6)


def test_the_formulae_on_columns_that_change_in_size_only():
    """Column j of model 0 grows by 1 + j, of model 1 by 1 + (3 - j): the ranks are j and 3 - j; directions stay."""
    base, grow = torch.eye(4), torch.arange(1.0, 5.0)
    first, second = torch.diag(1 + grow), torch.diag(1 + grow.flip(0))
    got = (widen(base, first, second, t=1.0, s=0.9) - base).diagonal()
    for j in range(4):
        ranks = torch.tensor([j, 3 - j]) / 4
        size = torch.where(ranks * 4 > 1.5, 0.9, ranks.softmax(0))
        # All changes of direction are 0: equals rank by index in both models.
        turn = torch.full((2,), 0.9 if j > 1.5 else 0.5)
        scores = (size + turn) / 2
        assert float(got[j]) == pytest.approx(float(scores[0] * (1 + j) + scores[1] * (4 - j)), abs=1e-6)


@pytest.mark.parametrize(("t", "s"), [(1.0, 1.0), (1.5, 0.8), (0.3, 2.0)])
def test_the_formulae_on_ordinary_matrices(t, s):
    experts = [BASE + 0.3 * noise(6, 10, seed=4), BASE + 0.05 * noise(6, 10, seed=5), BASE + noise(6, 10, seed=6)]

    def ranks(values: Tensor) -> Tensor:
        return torch.tensor([sorted(values.tolist()).index(v) for v in values.tolist()]) / 10

    def scores(changes: list[Tensor]) -> Tensor:
        r = torch.stack([ranks(c) for c in changes]).double()
        return torch.where(r > t * r.mean(1, keepdim=True), s, r.softmax(0))

    size = scores([(e.double().norm(dim=0) - BASE.double().norm(dim=0)).abs() for e in experts])
    turn = scores([1 - torch.cosine_similarity(e.double(), BASE.double(), 0) for e in experts])
    want = BASE + sum((e - BASE) * (a + b) / 2 for e, a, b in zip(experts, size, turn, strict=True))
    assert torch.allclose(widen(BASE, *experts, t=t, s=s), want.float(), atol=1e-5)


def test_only_the_order_of_the_changes_counts():
    """Sizes pushed apart monotonically keep all scores, so the merged change grows by the same factors."""
    base = torch.eye(5)
    sizes = torch.tensor([0.1, 0.4, 0.2, 0.5, 0.3])
    other = torch.diag(1 + torch.tensor([0.3, 0.1, 0.2, 0.5, 0.4]))
    plain = widen(base, torch.diag(1 + sizes), other)
    pushed = widen(base, torch.diag(1 + sizes**3), other)
    smaller = widen(base, torch.diag(1 + sizes * 0.01), other)  # what `other` gives falls out of the differences
    score = (plain - smaller).diagonal() / (sizes * 0.99)
    assert torch.allclose((plain - pushed).diagonal(), score * (sizes - sizes**3), atol=1e-5)
    assert len({round(float(s), 3) for s in score}) > 2


def test_vectors_go_by_the_size_of_their_changes():
    base, a, b = torch.zeros(4), torch.tensor([0.1, -0.2, 0.3, 1.0]), torch.tensor([0.4, 0.1, 0.1, 0.1])
    got = widen(base, a, b, t=1.0, s=0.7)
    powers = torch.stack([a.abs(), b.abs()]).softmax(0)
    scores = torch.where(torch.stack([a.abs() > a.abs().mean(), b.abs() > b.abs().mean()]), 0.7, powers)
    assert torch.allclose(got, a * scores[0] + b * scores[1], atol=1e-6)


def test_embeddings_rank_tokens():
    table, one, two = noise(12, 5), noise(12, 5, seed=1), noise(12, 5, seed=2)
    experts = (table + 0.1 * one, table + 0.2 * two)
    name = "model.embed_tokens.weight"
    got = widen(table, *experts, name=name)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(9))
    assert torch.allclose(widen(table[order], *(e[order] for e in experts), name=name), got[order], atol=1e-6)
    assert torch.allclose(got, widen(table.T, *(e.T for e in experts)).T, atol=1e-6)
    as_stored = widen(table, *experts, name=name, transpose_embeddings=False)
    assert torch.allclose(as_stored, widen(table, *experts), atol=1e-6)
    assert not torch.allclose(as_stored, got, atol=1e-3)


def test_columns_of_zeros():
    base, expert = noise(3, 4), noise(3, 4, seed=1)
    base[:, 0] = expert[:, 0] = 0  # zero in both: unchanged
    base[:, 1] = 0  # zero in the base only: changed by 1
    assert torch.isfinite(widen(base, expert, expert * 2)).all()
    # Directions: column 0 changes by 0 and ranks first, so its score is a softmax; with one model that is 1.
    assert torch.allclose(widen(base, expert), expert, atol=1e-6)


def test_a_base_is_needed():
    assert "base" in str(refusal(Widen(), 2, has_base=False))
    assert refusal(Widen(), 2) is None


def test_what_zeros_have_changed_by():
    """Columns: zero in both, in the base only, in the expert only, in neither."""
    base, expert = noise(3, 4), noise(3, 4, seed=1)
    base[:, 0] = expert[:, 0] = base[:, 1] = expert[:, 2] = 0
    size, turn = _changes(base.T.contiguous(), expert.T.contiguous())
    assert turn[:3].tolist() == [0, 1, 1]
    assert float(turn[3]) == pytest.approx(1 - float(torch.cosine_similarity(base[:, 3], expert[:, 3], 0)), abs=1e-6)
    lengths = [0, float(expert[:, 1].norm()), float(base[:, 2].norm())]
    assert size[:3].tolist() == pytest.approx(lengths)


def test_what_nobody_changed_stays_bit_for_bit():
    """Frequencies of rotary embeddings lie beside the weights in some checkpoints."""
    name, frequencies = "layers.0.self_attn.rotary_emb.inv_freq", 1 / 10000 ** torch.linspace(0, 1, 8)
    assert torch.equal(widen(frequencies, frequencies, frequencies.clone(), name=name), frequencies)
