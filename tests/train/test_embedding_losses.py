"""Losses, batches and gathering for embeddings: closed forms, loops, two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from embedding_cases import LABELS, features, losses, model, of_tasks
from torch import Tensor
from torch.nn.functional import cross_entropy

from kit import noise
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.train.embed import SimilarityLoss, TaskBatches, gather, info_nce, pearson, pro, rank_kl, similarity

DOUBLE = torch.float64
SIM = torch.tanh(noise(8, dtype=DOUBLE))
SCORES = LABELS.double()


# --- losses ------------------------------------------------------------------------------------------


def test_pearson_is_0_for_a_line_and_2_for_its_mirror():
    assert float(pearson(SIM, 3 * SIM - 7)) == pytest.approx(0, abs=1e-12)
    assert float(pearson(SIM, -2 * SIM)) == pytest.approx(2)
    assert float(pearson(SIM, SCORES)) == pytest.approx(float(pearson(SIM, 1e-5 * SCORES + 40)), rel=1e-9)


@pytest.mark.parametrize("loss", [pearson, rank_kl, pro, similarity])
def test_equal_scores_and_equal_similarities_give_finite_gradients(loss):
    for predicted, label in [(SIM, torch.ones(8)), (torch.ones(8), SCORES), (SIM[:1], SCORES[:1]), (SIM[:0], SIM[:0])]:
        point = predicted.clone().requires_grad_()
        value = loss(point, label)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(point.grad).all()
    assert float(pro(SIM, torch.ones(8))) == float(pearson(SIM, torch.ones(8))) == 0


def test_rank_kl_knows_the_order_only():
    assert torch.equal(rank_kl(SIM, SCORES, 0.3), rank_kl(SIM, torch.exp(SCORES) + 2, 0.3))
    ranks = torch.tensor([0, 6.5, 2.5, 2.5, 5, 1, 6.5, 4], dtype=DOUBLE)  # of LABELS, equal ones their mean
    target = ((7 - ranks) / 7 / 0.3).softmax(0)
    want = (target * (target.log() - (SIM / 0.3).log_softmax(0))).sum() / 8
    assert torch.allclose(rank_kl(SIM, SCORES, 0.3), want)
    assert float(rank_kl((7 - ranks) / 7, SCORES, 0.3)) == pytest.approx(0, abs=1e-12)


def pro_by_loop(predicted: Tensor, label: Tensor, temperature: float) -> Tensor:
    order = label.argsort(descending=True)
    predicted, label = predicted[order], label[order]
    terms = []
    for k in range(len(label)):
        lower = [j for j in range(k + 1, len(label)) if label[k] - label[j] > 1e-8]
        if lower:
            gaps = torch.stack([label[k] - label[j] for j in lower])
            logits = torch.cat([(gaps.max() * predicted[k])[None], gaps * predicted[lower]]) / temperature
            terms.append(-logits.log_softmax(0)[0])
    return torch.stack(terms).mean()


def test_pro_is_the_loop():
    for seed in range(3):
        one, other = (noise(8, seed=seed, dtype=DOUBLE).requires_grad_() for _ in range(2))
        loop, ours = pro_by_loop(one, SCORES, 0.05), pro(other, SCORES, 0.05)
        loop.backward()
        ours.backward()
        assert torch.allclose(loop, ours)
        assert torch.allclose(one.grad, other.grad)


def test_info_nce_is_the_loop():
    query, passages = noise(3, 5, dtype=DOUBLE), noise(3, 4, 5, seed=1, dtype=DOUBLE)  # two positives, two negatives
    terms = []
    for slot in range(2):
        for q in range(3):
            candidates = torch.cat([passages[:, slot], passages[:, 2:].flatten(0, 1)])  # own positive at place q
            terms.append(cross_entropy((candidates @ query[q] / 0.1)[None], torch.tensor([q])))
    assert torch.allclose(info_nce(query, passages, 2, 0.1), torch.stack(terms).mean())
    later = info_nce(query[1:], passages, 2, 0.1, first=1)
    assert torch.allclose(later, torch.stack([terms[1], terms[2], terms[4], terms[5]]).mean())


def test_wrong_shapes_and_values_are_refused():
    with pytest.raises(
        PlanError, match=r"passages must be \[queries, 3 positives .* for queries 0 to 3, got \[3, 2, 5\]"
    ):
        info_nce(noise(3, 5), noise(3, 2, 5), 3)
    with pytest.raises(PlanError, match=r"for queries 1 to 4"):
        info_nce(noise(3, 5), noise(3, 2, 5), first=1)
    with pytest.raises(RecipeError, match="temperature must be above 0, got 0"):
        rank_kl(SIM, SCORES, 0)
    with pytest.raises(PlanError, match=r"two lists of one length, got \[8\] and \[7\]"):
        similarity(SIM, SCORES[1:])
    with pytest.raises(PlanError, match="expected two columns of texts, got 3"):
        SimilarityLoss(model())([{"x": features(c)} for c in range(3)], LABELS)
    with pytest.raises(PlanError, match="expected 2 columns of positives, got 1"):
        losses(model(), False)["retrieval"][0]([{"x": features(c)} for c in range(2)])


# --- batches -----------------------------------------------------------------------------------------


def test_every_step_is_of_one_dataset_on_all_ranks():
    made = [TaskBatches([25, 40], [3, 2], ranks=2, rank=r, accumulation=2, seed=5) for r in range(2)]
    ranks = [list(sampler) for sampler in made]
    assert [len(batches) for batches in ranks] == [len(made[0])] * 2 == [(25 // 12 + 40 // 8) * 2] * 2
    for step in range(0, len(made[0]), 2):
        rows = [row for batches in ranks for micro in batches[step : step + 2] for row in micro]
        assert len(set(rows)) == len(rows) in (12, 8)
        assert all(row < 25 for row in rows) if len(rows) == 12 else all(row >= 25 for row in rows)
    assert [len(a) for a in ranks[0]] == [len(b) for b in ranks[1]]
    whole = [row for batches in ranks for batch in batches for row in batch]
    assert len(set(whole)) == len(whole) == 24 + 40
    again = TaskBatches([25, 40], [3, 2], ranks=2, accumulation=2, seed=5)
    assert list(again) == ranks[0]
    again.set_epoch(1)
    assert list(again) != ranks[0]


def test_a_dataset_gets_at_most_so_many_steps():
    sampler = TaskBatches([100, 6], [5, 2], max_batches=4)
    lengths = [len(batch) for batch in sampler]
    assert (lengths.count(5), lengths.count(2)) == (4, 3)


def test_a_dataset_without_a_full_batch_is_named():
    with pytest.warns(UserWarning, match="dataset 1 has 3 rows, fewer than the 4 of one step"):
        assert len(TaskBatches([8, 3], [4, 4])) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([8, 8], [4]), r"every one of 2 datasets needs a batch size of at least 1, got \[4\]"),
        (([8], [0]), r"every one of 1 datasets needs a batch size of at least 1, got \[0\]"),
        (([8], [2], {"ranks": 2, "rank": 2}), r"rank must be in 0 \.\. 1, got 2"),
        (([8], [2], {"accumulation": 0}), "ranks, accumulation and max_batches must be at least 1"),
    ],
)
def test_wrong_batches_are_refused(arguments: tuple, text: str):
    lengths, sizes, *rest = arguments
    with pytest.raises(RecipeError, match=text):
        TaskBatches(lengths, sizes, **(rest[0] if rest else {}))


# --- ranks -------------------------------------------------------------------------------------------


def test_two_ranks_have_the_gradients_of_the_whole_batch(tmp_path: Path):
    encoder, want = model(), {}
    for name, (loss, columns, labels) in losses(encoder, cross_device=False).items():
        encoder.zero_grad()
        value = loss([{"x": features(c)} for c in range(columns)], labels)
        value.backward()
        want[name] = (value.detach(), encoder.weight.grad.clone())
    script, out = Path(__file__).with_name("gloo_rank.py"), tmp_path / "found.pt"
    path = os.pathsep.join([*sys.path, str(script.parents[1])])
    started = [
        subprocess.Popen(
            [sys.executable, script, str(r), tmp_path / "store", out], env=os.environ | {"PYTHONPATH": path}
        )
        for r in range(2)
    ]
    assert [process.wait(120) for process in started] == [0, 0]
    found = torch.load(out, weights_only=True)
    assert found.pop("refusal") == "gathering embeddings needs equal batches on all ranks, got 2, 3 rows"
    (tasks, first, weights), (others, second, same) = found.pop("tasks")
    alone, whole, trained = of_tasks(1, 0, 8)
    assert tasks == others == alone
    assert set(tasks) == {"a", "b"}
    assert [[*a, *b] for a, b in zip(first, second, strict=True)] == whole
    assert torch.equal(weights, same)
    assert torch.allclose(weights, trained, atol=1e-6)  # moments are float32
    assert set(found) == set(want)
    for name, (value, gradient) in want.items():
        assert torch.allclose(found[name][0], value)
        assert torch.allclose(found[name][1], gradient, atol=1e-12)
    assert gather(SIM) is SIM  # one process
