"""LiNeS: closed forms."""

from __future__ import annotations

import pytest
import torch
from driver import merge

from kit import noise
from weightsmith.core.errors import RecipeError
from weightsmith.core.method import Pipeline
from weightsmith.methods.lines import Lines
from weightsmith.methods.task_arithmetic import TaskArithmetic
from weightsmith.methods.ties import Ties

BLOCKS = 11
NAMES = [f"model.layers.{i}.mlp.experts.1.w1.weight" for i in range(BLOCKS)]
OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


BASE = {n: noise(3, 4, seed=i) for i, n in enumerate(NAMES + OUTSIDE)}
EXPERTS = {
    f"e{j}": {n: b + noise(3, 4, seed=100 * j + i + 50) for i, (n, b) in enumerate(BASE.items())} for j in range(3)
}
ONE = {"e0": EXPERTS["e0"]}


def factors(experts, *stages) -> dict[str, float]:
    """What each tensor's summed task vector was multiplied by."""
    out = merge(experts, Pipeline(stages), base=BASE)
    tau = {n: sum(e[n] - b for e in experts.values()) for n, b in BASE.items()}
    return {n: float(((out[n] - b) / tau[n]).median()) for n, b in BASE.items()}


def test_alpha_one_beta_zero_changes_nothing():
    got = merge(EXPERTS, [TaskArithmetic(), Lines(alpha=1, beta=0.0)], base=BASE)
    plain = merge(EXPERTS, TaskArithmetic(), base=BASE)
    assert all(torch.equal(got[n], plain[n]) for n in BASE)


def test_editing_one_model_from_base_to_expert():
    got = factors(ONE, TaskArithmetic(), Lines(alpha=0.0, beta=1.0))
    assert [round(got[n], 4) for n in NAMES] == [round(i / 10, 4) for i in range(BLOCKS)]
    assert [got[n] for n in OUTSIDE] == [0, 0, 0]


def test_by_default_one_model_keeps_the_change_of_its_last_block():
    for alpha in (0.0, 0.25, 1.0):
        got = factors(ONE, TaskArithmetic(), Lines(alpha=alpha))
        assert got[NAMES[0]] == pytest.approx(alpha, abs=1e-5)
        assert got[NAMES[-1]] == pytest.approx(1.0, rel=1e-5)
    same = merge(ONE, [TaskArithmetic(), Lines()], base=BASE)
    assert all(torch.allclose(same[n], ONE["e0"][n], atol=1e-6) for n in BASE)
    assert factors(EXPERTS, TaskArithmetic(), Lines(alpha=0.25))[NAMES[-1]] == pytest.approx(0.75, rel=1e-4)


def test_outside_by_depth():
    got = factors(ONE, TaskArithmetic(), Lines(alpha=0.2, beta=0.7, outside="depth"))
    assert [got[n] for n in OUTSIDE] == pytest.approx([0.2, 0.9, 0.9], rel=1e-4)


def test_auto_alpha_of_a_sum_is_one_over_n():
    got = factors(EXPERTS, TaskArithmetic(), Lines(beta=0.5))
    assert got["model.norm.weight"] == pytest.approx(1 / 3, rel=1e-4)
    assert got[NAMES[-1]] == pytest.approx(1 / 3 + 0.5, rel=1e-4)


def test_auto_alpha_uses_the_raw_task_vectors_and_ignores_their_scale():
    def alpha(scale: float) -> float:
        experts = {m: {n: BASE[n] + scale * (t - BASE[n]) for n, t in e.items()} for m, e in EXPERTS.items()}
        ties = Ties(density=0.3)
        merged = merge(experts, ties, base=BASE)
        out = merge(experts, Pipeline((ties, Lines(beta=0.0))), base=BASE)
        tau = {n: merged[n] - b for n, b in BASE.items()}
        raw = sum(sum(e[n] - b for e in experts.values()).abs().sum() for n, b in BASE.items())
        wanted = float(raw / sum(t.abs().sum() for t in tau.values())) / 3
        place = tau["lm_head.weight"] != 0
        found = float(((out["lm_head.weight"] - BASE["lm_head.weight"])[place] / tau["lm_head.weight"][place]).median())
        assert found == pytest.approx(wanted, rel=1e-4)
        return found

    assert alpha(1.0) == pytest.approx(alpha(2.0), rel=1e-3)


def test_nothing_merged_gives_the_base_and_one_block_is_the_last():
    same = merge({"a": BASE, "b": BASE}, [TaskArithmetic(), Lines()], base=BASE)
    assert all(torch.equal(same[n], BASE[n]) for n in BASE)
    name = "h.0.w"
    got = merge(
        {"a": {name: torch.ones(2)}}, [TaskArithmetic(), Lines(alpha=0.5, beta=0.25)], base={name: torch.zeros(2)}
    )
    assert got[name].tolist() == [0.75, 0.75]


def test_its_place_is_behind_the_method():
    with pytest.raises(RecipeError, match="lines works on the merged task vector; put it behind task_arithmetic"):
        _ = (Lines() | TaskArithmetic()).method
    with pytest.raises(RecipeError, match="behind the merging method"):
        merge(ONE, [Lines(), TaskArithmetic()], base=BASE)
