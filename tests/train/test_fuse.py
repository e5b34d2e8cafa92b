"""Fusion-X: gate, sparse loss, alignment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kit import noise
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.train import fuse
from weightsmith.train.fuse.align import edit_distance

B, L, V, M, K = 4, 5, 12, 3, 4
LOSSES = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [1.5, 1.5, 1.5], [0.1, 5.0, 2.0]])


def candidates() -> list[fuse.TopK]:
    return [fuse.top_k(noise(B, L, V, seed=i), K - (i == 2)) for i in range(M)]


def dense(weights: Tensor, temperature: float = 1.0) -> Tensor:
    """q over the whole vocabulary."""
    ids, probabilities = fuse.stacked(candidates(), temperature)
    q = torch.zeros(B, L, V)
    for i in range(M):
        q.scatter_add_(-1, ids[:, :, i], weights[:, None, i, None] * probabilities[:, :, i])
    return q


# --- distributions -----------------------------------------------------------------------------------


def test_top_k_are_the_largest():
    logits = 1000 * noise(2, 3, 8)  # beyond float16
    found = fuse.top_k(logits, 3)
    values, ids = logits.topk(3)
    assert torch.equal(found.ids.long(), ids)
    assert torch.allclose(found.probabilities(500.0), (values / 500).softmax(-1), atol=1e-3)
    assert found.nbytes == 2 * 3 * 3 * 6
    with pytest.raises(RecipeError, match=r"k must be in 1 \.\. 8 \(the vocabulary\), got 9"):
        fuse.top_k(logits, 9)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_the_sparse_loss_is_the_dense_one(kind):
    mask = torch.tensor([[1, 1, 1, 0, 0]] + [[1] * L] * 3).bool()
    logits = noise(B, L, V, seed=9)
    points = [(logits.clone().requires_grad_(), LOSSES.softmax(1).requires_grad_()) for _ in range(2)]
    ids, probabilities = fuse.stacked(candidates())
    sparse = fuse.fused_loss(points[0][0], ids, probabilities, points[0][1], mask, kind)
    q = dense(points[1][1])
    assert torch.allclose(q.sum(-1), torch.ones(B, L), atol=1e-5)
    entropy = -(q * q.clamp(min=1e-30).log()).sum(-1)
    each = -(q * points[1][0].log_softmax(-1)).sum(-1) - (entropy if kind == "kl" else 0)
    whole = each[mask].mean()
    assert torch.allclose(sparse, whole)
    sparse.backward()
    whole.backward()
    for one, other in zip(*points, strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_one_candidate_is_plain_distillation():
    own = candidates()[:1]
    student, labels = noise(B, L, V, seed=9), noise(B, L, seed=1).abs().long()
    labels[0, 3:] = -100
    fusion = fuse.Fusion(fuse.Gate(1), lm_weight=0.25)
    logp = student.log_softmax(-1)
    target = torch.zeros(B, L, V).scatter(-1, own[0].ids.long(), own[0].probabilities())
    fused = -(target * logp).sum(-1)[labels != -100].mean()
    lm = torch.nn.functional.nll_loss(logp[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(fusion(student, labels, own, LOSSES[:, :1]), 0.25 * lm + 0.75 * fused)
    assert fusion.last["balance"] == 0
    assert fusion.last["candidates"] == 1


# --- the gate ----------------------------------------------------------------------------------------


def test_a_new_gate_takes_the_mean():
    weights = fuse.Gate(M)(LOSSES)
    assert torch.allclose(weights, torch.full((B, M), 1 / 3))
    assert fuse.balance(weights).item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(fuse.uniform(LOSSES), weights)


def gate_with(bias: list[float], threshold: float) -> fuse.Gate:
    gate = fuse.Gate(M, threshold)
    gate.mlp[-1].bias.data = torch.tensor(bias).log()
    return gate


def test_selection_keeps_what_reaches_the_threshold():
    shares = [0.6, 0.3, 0.1]
    for threshold, want in [(0, shares), (0.25, [2 / 3, 1 / 3, 0]), (0.5, [1, 0, 0]), (1, [1, 0, 0])]:
        assert torch.allclose(gate_with(shares, threshold)(LOSSES)[0], torch.tensor(want).float(), atol=1e-6)
    assert gate_with([0.2, 0.4, 0.4], 1)(LOSSES)[0].tolist() == [0, 1, 0]  # of equal ones the first
    missing = torch.tensor([[torch.nan, 1.0, torch.inf], [1.0, torch.nan, 1.0]])
    assert torch.allclose(gate_with(shares, 0)(missing), torch.tensor([[0, 1, 0], [6 / 7, 0, 1 / 7]]), atol=1e-6)
    with pytest.raises(PlanError, match="a sequence has no candidate with a finite loss"):
        gate_with(shares, 0)(missing[:, :1].expand(2, 3))


def test_balance_is_the_relative_variance():
    weights = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # importance 2, 1, 0
    assert float(fuse.balance(weights)) == pytest.approx(1.0)


def test_fixed_rules():
    assert fuse.best(LOSSES).tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert torch.allclose(fuse.by_loss(LOSSES), (-LOSSES).softmax(1))
    missing = torch.tensor([[torch.nan, 2.0, 1.0]])
    assert fuse.best(missing).tolist() == [[0, 0, 1]]
    assert fuse.by_loss(missing)[0, 0] == 0
    assert fuse.uniform(missing).tolist() == [[0, 0.5, 0.5]]
    assert torch.allclose(fuse.rewards(torch.tensor([0.0, 1.0, torch.nan])), torch.tensor([1, 1 / torch.e, 0]))


def test_the_gate_learns():
    gate = fuse.Gate(M)
    fusion = fuse.Fusion(gate)
    before = gate(LOSSES).detach()
    optimizer = torch.optim.Adam(fusion.parameters(), 0.05)
    for _ in range(2):  # the last layer first, through it the others
        optimizer.zero_grad()
        fusion(noise(B, L, V, seed=9), torch.ones(B, L).long(), candidates(), LOSSES).backward()
        optimizer.step()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in gate.parameters())
    assert not torch.allclose(gate(LOSSES), before, atol=1e-3)


def test_a_trained_gate_finds_who_is_right():
    """Each of two sources knows one half of the sequences, and is sure of something wrong on the other half."""
    n, v = 16, 6
    truth = torch.arange(n)[:, None].expand(n, L) % v
    sure = 6 * torch.nn.functional.one_hot(truth, v).float()
    wrong = 6 * torch.nn.functional.one_hot((truth + 1) % v, v).float()
    half = (torch.arange(n) < n // 2)[:, None, None]
    found = [fuse.top_k(torch.where(half, sure, wrong), v), fuse.top_k(torch.where(half, wrong, sure), v)]
    nll = [-(c.probabilities() * (c.ids == truth[:, :, None])).sum(-1).log().mean(1) for c in found]
    losses = torch.stack(nll, 1)
    student = torch.nn.Parameter(torch.zeros(n, L, v))
    fusion = fuse.Fusion(fuse.Gate(2), lm_weight=0.5)
    optimizer = torch.optim.Adam([student, *fusion.parameters()], 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        fusion(student, truth, found, losses).backward()
        optimizer.step()

    def wrongness(weights: Tensor) -> float:
        ids, probabilities = fuse.stacked(found)
        q = (probabilities * weights[:, None, :, None] * (ids == truth[:, :, None, None])).sum((2, 3))
        return float(-q.clamp(min=1e-6).log().mean())

    learned = wrongness(fusion.gate(losses).detach())
    assert learned < 0.1 * wrongness(fuse.uniform(losses))
    assert learned < 0.1 * min(wrongness(torch.eye(2)[[i]].expand(n, 2)) for i in range(2))


# --- alignment ---------------------------------------------------------------------------------------


def test_edit_distances():
    assert [edit_distance(*pair) for pair in [("kitten", "sitting"), ("", "abc"), ("abc", "abc"), ("ab", "ba")]] == [
        3, 3, 0, 2,
    ]  # fmt: skip


def test_equal_tokenizers_are_the_identity():
    vocabulary = {f"Ġtoken{i}": i for i in range(V)}
    assert fuse.map_vocabulary(vocabulary, vocabulary).tolist() == list(range(V))
    where = [["bos", (0, 3), (4, 7), (8, 9), (9, 12)]] * B
    assert fuse.match(where[0], where[0]) == list(range(L))
    found, own = candidates()[0], candidates()[1]
    aligned = fuse.Alignment.of(vocabulary, vocabulary).apply(found, own, where, where)
    assert torch.equal(aligned.ids, found.ids)
    assert torch.equal(aligned.logits, found.logits)


def test_vocabularies_are_mapped_by_text_then_by_likeness():
    source = {"Ġhello": 0, "hello": 1, "Ġcolour": 2, "xyzzy": 3, "ab": 4}
    target = {"▁hello": 5, "hello": 6, "▁color": 7, "ac": 8}
    assert fuse.map_vocabulary(source, target, size=6).tolist() == [5, 6, 7, -1, -1, -1]
    assert fuse.map_vocabulary(source, target, near=0)[2] == -1


def test_split_words_are_not_matched():
    text = "The unbelievable end."
    source = fuse.places(text, [(0, 0), (0, 3), (3, 6), (6, 12), (12, 16), (16, 20), (20, 21)], range(7), {0: "bos"})
    target = fuse.places(text, [(0, 0), (0, 4), (4, 17), (17, 20), (20, 21), (0, 0)], range(6), {0: "bos"})
    assert source == ["bos", (0, 3), (4, 6), (6, 12), (12, 16), (17, 20), (20, 21)]
    assert fuse.match(source, target) == [0, 1, -1, 5, 6, -1]
    assert fuse.match(target, source) == [0, 1, -1, -1, -1, 3, 4]
    assert fuse.match([(0, 1), (0, 1), "pad", "pad"], [(0, 1), "pad", "pad", "pad"]) == [-1, 2, 3, -1]


def test_unmatched_positions_keep_the_targets_own():
    source = {"[CLS]": 0, "the": 1, "un": 2, "able": 3, "end": 4, "odd": 5}
    target = {"<s>": 0, "unable": 1, "the": 2, "end": 3}
    tokens, targets = [["bos", (0, 3), (4, 6), (6, 10), (11, 14)]], [["bos", (0, 3), (4, 10), (11, 14)]]
    logits = torch.full((1, 5, 6), -9.0)
    logits[0, :, 1], logits[0, 1, 4], logits[0, 4, 5] = 0, 2, 3  # after "the" the end, after the end something unknown
    found, own = fuse.top_k(logits, 2), fuse.top_k(noise(1, 4, 4), 2)
    aligned = fuse.Alignment.of(source, target, {"[CLS]": "<s>"}).apply(found, own, tokens, targets)
    p = aligned.probabilities()
    assert (aligned.ids[0, 0, 0], aligned.ids[0, 1].tolist()) == (2, [3, 2])
    assert p[0, 1].tolist() == pytest.approx(torch.tensor([2.0, 0.0]).softmax(0).tolist(), abs=1e-3)
    assert torch.equal(aligned.ids[0, 2], own.ids[0, 2])
    assert torch.equal(aligned.logits[0, 2], own.logits[0, 2])
    assert aligned.ids[0, 3, 0] == 2
    assert p[0, 3].tolist() == [1, 0]  # the unknown word takes no part


def test_what_does_not_fit_is_refused():
    with pytest.raises(PlanError, match="the two vocabularies share no token"):
        fuse.Alignment.of({"a": 0}, {"b": 0})
    with pytest.raises(PlanError, match=r"special token '<s>' is not in the vocabulary that should have it"):
        fuse.Alignment.of({"[CLS]": 0, "a": 1}, {"a": 0}, {"[CLS]": "<s>"})
    with pytest.raises(PlanError, match=r"cover different positions: \[\(4, 4\), \(4, 5\)\]; align them first"):
        fuse.stacked([candidates()[0], fuse.top_k(noise(B, 4, V), 2)])
    ids, probabilities = fuse.stacked(candidates())
    with pytest.raises(PlanError, match=r"a candidate has token 11, the student's vocabulary is 8"):
        fuse.fused_loss(noise(B, L, 8), ids, probabilities, fuse.uniform(LOSSES), torch.ones(B, L).bool())
    with pytest.raises(RecipeError, match=r"lm_weight must be in \[0, 1\], .* got 2, 0\.5, 1\.0, 'ce'"):
        fuse.Fusion(fuse.uniform, lm_weight=2)
    with pytest.raises(RecipeError, match=r"a gate needs candidates and a threshold in \[0, 1\], got 2 and 1\.5"):
        fuse.Gate(2, 1.5)
