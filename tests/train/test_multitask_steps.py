"""Sampling, the task-balanced optimizer, likelihood over candidates, metrics: closed forms and laws."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from kit import noise
from weightsmith.core.errors import RecipeError
from weightsmith.train.multitask import (
    MTAdamW,
    MultiTaskSampler,
    candidate_loss,
    candidate_scores,
    in_batch_loss,
    rates_of,
)
from weightsmith.train.multitask.likelihood import Temperature, checked_candidates
from weightsmith.train.multitask.metrics import score

# --- sampling ----------------------------------------------------------------------------------------

SIZES = {"a": 900, "b": 100}


def test_rates_follow_the_temperature():
    assert rates_of(SIZES, 1.0) == pytest.approx({"a": 0.9, "b": 0.1})
    assert rates_of(SIZES) == pytest.approx({"a": 0.75, "b": 0.25})
    assert rates_of(SIZES, math.inf) == pytest.approx({"a": 0.5, "b": 0.5})


@pytest.mark.parametrize(
    ("how", "want"), [("unmixed", 0.75), ("proportional", 0.9), ("temperature", 0.75), ("concat", 0.9)]
)
def test_tasks_come_at_their_rates(how: str, want: float):
    """Within three standard deviations; one task per step where unmixed; the sequence is the seed's."""
    sampler = MultiTaskSampler(SIZES, steps=1000, batch=4, how=how, seed=1)
    steps = list(sampler)
    drawn = len(steps) if how == "unmixed" else 4 * len(steps)
    share = sum(row < 900 for batch in steps for row in batch) / (4 * len(steps))
    assert abs(share - want) < 3 * math.sqrt(want * (1 - want) / drawn)
    assert steps == list(MultiTaskSampler(SIZES, steps=1000, batch=4, how=how, seed=1))
    assert steps != list(MultiTaskSampler(SIZES, steps=1000, batch=4, how=how, seed=2))
    if how == "unmixed":
        assert all(len({row < 900 for row in batch}) == 1 for batch in steps)
        assert [sampler.task(s) == "a" for s in (1, 2, 3)] == [batch[0] < 900 for batch in steps[:3]]


def test_every_example_of_a_task_comes_before_one_comes_twice():
    for how in ("unmixed", "mixed", "concat"):
        rows = [row for batch in MultiTaskSampler({"a": 8, "b": 4}, steps=60, batch=3, how=how) for row in batch]
        for own in (range(8), range(8, 12)):
            mine = [row for row in rows if row in own]
            assert sorted(mine[: len(own)]) == sorted(mine[len(own) : 2 * len(own)]) == list(own)


def test_mixed_batches_hold_every_task():
    for batch in MultiTaskSampler(SIZES, {"a": 0.9, "b": 0.1}, steps=5, batch=5, how="mixed"):
        assert Counter(row < 900 for row in batch) == {True: 4, False: 1}
    with pytest.raises(RecipeError, match="a mixed batch of 1 holds no example of some of the 2 tasks; enlarge it"):
        MultiTaskSampler(SIZES, steps=5, batch=1, how="mixed")


def test_ranks_and_micro_steps_share_the_task_and_no_row():
    ranks = [MultiTaskSampler({"a": 64, "b": 64}, steps=6, batch=2, accumulation=3, ranks=2, rank=r) for r in (0, 1)]
    whole = MultiTaskSampler({"a": 64, "b": 64}, steps=6, batch=12)
    for step in range(1, 7):
        assert ranks[0].task(step) == ranks[1].task(step) == whole.task(step)
        rows = [row for rank in ranks for micro in rank.micro_batches(step) for row in micro]
        assert sorted(rows) == sorted(whole.micro_batches(step)[0])
        assert len(set(rows)) == 12


@pytest.mark.parametrize(
    ("lengths", "rates", "message"),
    [
        ({"a": 3, "b": 0}, None, "task 'b' has no examples; leave it out"),
        (SIZES, {"a": 0.5, "b": 0.4}, "rates sum to 0.9, not to 1; divide each by 0.9"),
        (SIZES, {"a": 1.0, "b": 0.0}, "task 'b' has examples, but a rate of 0; leave it out"),
        (SIZES, {"a": 0.5, "b": 0.25, "bb": 0.25}, "there is no task 'bb'; did you mean 'b'"),
    ],
)
def test_rates_that_make_no_sense(lengths: dict[str, int], rates: dict[str, float] | None, message: str):
    with pytest.raises(RecipeError, match=message):
        MultiTaskSampler(lengths, rates, steps=3, batch=2)


# --- the optimizer -----------------------------------------------------------------------------------


def test_one_task_is_adamw_step_for_step():
    """Rate 1, weight |g|: nothing is left of the balance."""
    ours, theirs = (nn.Parameter(noise(5, 3)) for _ in range(2))
    mine = MTAdamW([ours], 1e-2, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], 1e-2, weight_decay=0.1)
    for step in range(8):
        g = noise(5, 3, seed=step) * 10**step
        ours.grad, theirs.grad = g.clone(), g.clone()
        mine.step(task="a", weight=float(g.norm()))
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_rates_drop_out_of_the_mean_direction():
    """Constant gradients, drawn at 0.9 and 0.1: the long-run mean of m is w_A g_A/|g_A| + w_B g_B/|g_B|."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = MTAdamW([p], lr=1e-4, betas=(0.99, 0.999))
    rates, weights = {"A": 0.9, "B": 0.1}, {"A": 1.0, "B": 2.0}
    grads = {"A": torch.tensor([3.0, 0.0]), "B": torch.tensor([0.0, 1e-3])}
    sampler = MultiTaskSampler({"A": 9, "B": 1}, rates, steps=12_000, batch=1, seed=3)
    total = torch.zeros(2)
    for step in range(1, 12_001):
        name = sampler.task(step) or ""
        p.grad = grads[name].clone()
        optimizer.step(task=name, rate=rates[name], weight=weights[name])
        total += optimizer.state[p]["exp_avg"] if step > 1000 else 0
    share = sum(sampler.task(s) == "B" for s in range(1, 12_001)) / 12_000
    want = torch.tensor([(1 - share) / 0.9, 2 * share / 0.1])  # of this sequence; [1, 2] of the rates
    torch.testing.assert_close(total / 11_000, want, rtol=0.02, atol=0)
    assert abs(want[1] - 2) < 0.2


def test_decay_is_not_divided_by_the_rate():
    found = []
    for decay in (0.0, 0.5):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.tensor([1.0, -2.0, 0.5])
        MTAdamW([p], lr=0.1, weight_decay=decay).step(task="a", rate=0.1)
        found.append(p.detach())
    torch.testing.assert_close(found[0] - found[1], torch.full((3,), 0.1 * 0.5))


def trained(optimizer: str, scales: tuple[float, float], steps: int = 400) -> tuple[float, float]:
    """Accuracy on two tasks whose losses have these scales: classes of a shared layer's features."""
    torch.manual_seed(0)
    shared, heads = nn.Linear(8, 2), [nn.Linear(2, 2), nn.Linear(2, 2)]
    x = noise(512, 8, seed=5)
    labels = [(x[:, 0] > 0).long(), (x[:, 1] > 0).long()]
    parameters = [p for module in (shared, *heads) for p in module.parameters()]
    if optimizer == "mt":
        made: torch.optim.Optimizer = MTAdamW(parameters, lr=3e-3, weight_decay=0.0)
    else:
        made = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    sampler = MultiTaskSampler({"0": 512, "1": 512}, steps=steps, batch=32)
    for step in range(1, steps + 1):
        rows, task = sampler.micro_batches(step)[0], int(sampler.task(step) or 0)
        rows = [row % 512 for row in rows]
        made.zero_grad()
        (scales[task] * nn.functional.cross_entropy(heads[task](shared(x[rows])), labels[task][rows])).backward()
        made.step(task=str(task), rate=0.5) if isinstance(made, MTAdamW) else made.step()
    with torch.no_grad():
        found = [float((heads[t](shared(x)).argmax(1) == labels[t]).float().mean()) for t in (0, 1)]
    return found[0], found[1]


def test_unequal_losses_are_balanced():
    """100 times the loss of the other: both are learnt; AdamW lets the small one lag."""
    balanced, plain = trained("mt", (100.0, 1.0)), trained("adamw", (100.0, 1.0))
    assert min(balanced) > 0.95
    assert plain[1] < balanced[1] - 0.03


def test_the_scale_of_a_loss_changes_nothing():
    assert trained("mt", (1024.0, 1.0), 50) == trained("mt", (1.0, 1.0), 50)


def test_unusable_gradients_are_counted_and_unused_parameters_stay():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = MTAdamW([used, unused], weight_decay=0.1)
    for g in (torch.zeros(2), torch.tensor([math.inf, 0.0])):
        used.grad = g
        optimizer.step(task="a")
    assert optimizer.skipped == {"a": 2}
    assert torch.equal(used, torch.ones(2))
    used.grad = torch.ones(2)
    with pytest.warns(UserWarning, match="rate of 0.001 makes its gradients spike"):
        optimizer.step(task="a", rate=0.001)
    assert torch.equal(unused, torch.ones(2))
    assert set(optimizer.state) == {used}
    g = 1 / math.sqrt(2)  # n takes 100 times g^2 at most, m all of 1000 g
    assert optimizer.state[used]["exp_avg_sq"].tolist() == pytest.approx([0.1 * g * g] * 2, rel=1e-4)
    assert optimizer.state[used]["exp_avg"].tolist() == pytest.approx([100 * g] * 2, rel=1e-4)
    with pytest.raises(RecipeError, match="rate must be in"):
        optimizer.step(task="a", rate=0.0)


# --- likelihood --------------------------------------------------------------------------------------


def test_likelihood_is_that_of_the_cosines():
    x, y = torch.tensor([[2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 3.0]])
    assert candidate_scores(x, y, 0.5).tolist() == [[2.0, 0.0]]
    assert float(candidate_loss(x, y, torch.tensor([0]), 0.5)) == pytest.approx(math.log(1 + math.exp(-2)))


def test_equal_answers_are_no_negatives():
    x = noise(3, 4)
    y = torch.stack([x[1], x[1], x[0]])
    want = sum(
        -candidate_scores(x, y, 0.1)[i, keep].log_softmax(-1)[at]
        for i, keep, at in [(0, [0, 2], 0), (1, [1, 2], 0), (2, [0, 1, 2], 2)]
    )
    assert float(in_batch_loss(x, y, ["b", "b", "a"], 0.1)) == pytest.approx(float(want), rel=1e-5)


def test_the_temperature_stays_above_its_least():
    tau = Temperature(0.07)
    assert float(tau().detach()) == pytest.approx(0.07)
    with torch.no_grad():
        tau.log.fill_(-20)
    assert float(tau().detach()) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a"], "at least two names, got 1"), (["a", "b", "a "], "candidate 'a' stands twice"), (["a", " "], "is empty")],
)
def test_candidates_that_make_no_sense(names: list[str], message: str):
    with pytest.raises(RecipeError, match=message):
        checked_candidates("t", names)


# --- metrics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "found", "wanted", "value"),
    [
        ("accuracy", [1, 2], [1, 0], 50.0),
        ("exact", ["a  b", "a"], ["a b", "b"], 50.0),
        ("f1", ["a b c"], ["a b d e"], 100 * 4 / 7),
        ("rouge_l", ["the cat sat"], ["the sat cat on"], 100 * 4 / 7),
        ("set_f1", ["x drug, y sign"], ["Y sign; x  drug"], 100.0),
        ("bleu", ["a b c d e"], ["a b c d e"], 100.0),
        ("bleu", ["a b c d"], ["a b c d e"], 100 * math.exp(1 - 5 / 4)),
    ],
)  # fmt: skip
def test_metrics(metric: str, found: list[str], wanted: list[str], value: float):
    assert score(metric, found, wanted) == pytest.approx(value)


def test_metrics_of_maps_count_valid_pixels():
    found, wanted = [torch.tensor([1.0, 9.0])], [torch.tensor([2.0, 0.0])]
    valid: list[Tensor] = [torch.tensor([True, False])]
    assert score("rmse", found, wanted, valid) == 1.0
    assert score("psnr", found, [torch.tensor([1.1, 9.1])]) == pytest.approx(20, rel=1e-4)
    with pytest.raises(RecipeError, match="no pixel of these maps is valid"):
        score("mae", found, wanted, [torch.tensor([False, False])])
