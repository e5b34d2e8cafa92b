"""The formulas of a study, by hand; published orders against figures; the ledger."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from weightsmith.core.method import registered
from weightsmith.study.cache import Ledger, fingerprint
from weightsmith.study.figures import Reference, tau
from weightsmith.study.grids import BUDGET, GRIDS, candidates, edges, offered
from weightsmith.study.orderings import PUBLISHED, Chain, compare

UP = Reference({"a": 50.0, "b": 60.0, "g": 70.0}, {"a": 100.0, "b": 80.0}, higher_is_better=True)
DOWN = Reference({"a": 4.0, "b": 3.0}, {"a": 2.0, "b": 2.0}, higher_is_better=False)


def test_where_higher_is_better() -> None:
    model = {"a": 75.0, "b": 80.0, "g": 60.0}
    assert UP.score(model) == 77.5
    assert UP.normalised(model) == (0.75 + 1.0) / 2
    assert UP.gain_kept(model) == (0.5 + 1.0) / 2
    assert UP.forgetting(model, ["g"]) == 10.0
    assert UP.forgetting({"a": 40.0, "b": 90.0}, []) == 5.0  # b got better: that is not minus forgetting


def test_where_lower_is_better() -> None:
    model = {"a": 3.0, "b": 4.0}
    assert DOWN.normalised(model) == (2 / 3 + 2 / 4) / 2
    assert DOWN.gain_kept(model) == (0.5 - 1.0) / 2
    assert DOWN.forgetting(model, []) == 0.5
    assert DOWN.better(2.0, 3.0)


@pytest.mark.parametrize("reference", [UP, DOWN])
def test_an_expert_is_whole_and_the_base_forgets_nothing(reference: Reference) -> None:
    assert reference.normalised(reference.expert) == 1.0
    assert reference.gain_kept(reference.expert) == 1.0
    assert reference.gain_kept(reference.base) == 0.0
    assert reference.forgetting(reference.base, []) == 0.0


def test_an_expert_that_gained_nothing_is_not_divided_by() -> None:
    idle = Reference({"a": 50.0, "b": 60.0}, {"a": 50.2, "b": 80.0}, higher_is_better=True)
    assert idle.gaining() == ("b",)
    assert idle.gain_kept({"a": 0.0, "b": 70.0}) == 0.5
    useless = Reference({"a": 50.0}, {"a": 40.0}, higher_is_better=True)
    assert useless.gain_kept({"a": 45.0}) is None
    failed = Reference({"a": 0.0}, {"a": 0.0}, higher_is_better=True)
    assert failed.normalised({"a": 1.0}) is None


def test_scores_that_are_not_above_0_have_no_share_and_no_gain() -> None:
    nothing = Reference({"a": 0.0}, {"a": 0.0}, higher_is_better=True)
    assert nothing.gain_kept({"a": 0.1}) is None
    likelihood = Reference({"a": -3.0}, {"a": -2.0}, higher_is_better=True)
    assert likelihood.normalised({"a": -4.0}) is None  # a share of 2
    assert likelihood.gain_kept({"a": -2.5}) == 0.5


def test_tau() -> None:
    assert tau([1, 2, 3], [10, 20, 30]) == 1
    assert tau([1, 2, 3], [30, 20, 10]) == -1
    assert tau([1, 2, 3], [10, 30, 20]) == pytest.approx(1 / 3)
    assert tau([1, 2], [5, 5]) == 0
    assert tau([1], [2]) is None


def test_published_orders_are_held_against_figures() -> None:
    chains = (Chain("paper", ("average", "task_arithmetic", "ties", "unheard_of")), Chain("alone", ("ties", "x")))
    figures = {"average": [0.5, 0.5], "task_arithmetic": [0.6, 0.8], "ties": [0.4, 0.44]}
    (verdict,) = compare(figures, chains)
    assert verdict.methods == ("average", "task_arithmetic", "ties")
    assert verdict.measured == ("ties", "average", "task_arithmetic")
    assert verdict.tau == pytest.approx(-1 / 3)
    rising, falling = verdict.pairs
    assert rising.difference == pytest.approx(0.2)
    assert rising.error == pytest.approx(0.1)  # of 0.1 and 0.3: deviation 0.1414, over sqrt 2
    assert falling.verdict == "broken"
    assert (
        compare({"average": [0.5, 0.5], "ties": [0.6, 0.6]}, (Chain("p", ("average", "ties")),))[0].pairs[0].verdict
        == "kept"
    )
    noisy = compare({"average": [0.5, 0.5], "ties": [0.9, 0.2]}, (Chain("p", ("average", "ties")),))
    assert noisy[0].pairs[0].verdict == "too close"


def test_every_published_method_has_a_grid_within_the_budget() -> None:
    assert {method for chain in PUBLISHED for method in chain.methods} <= set(GRIDS)
    for label, written in GRIDS.items():
        made = candidates(written)
        assert 1 <= len(made) <= BUDGET, label
        assert len({c.label for c in made}) == len(made)


def test_candidates_are_the_product_of_the_lists() -> None:
    made = candidates((("dare", {"density": [0.2, 0.5]}), ("ties", {"lambda": [1.0], "density": [[0.1, 0.3]]})))
    assert [c.label for c in made] == ["density 0.2", "density 0.5"]
    assert made[1].stages[1].parameters == {"lambda": 1.0, "density": [0.1, 0.3]}  # a ramp over depth


def test_edges_of_a_grid() -> None:
    made = candidates((("dare", {"density": [0.2, 0.5]}), ("ties", {"lambda": [0.5, 1.0, 2.0]})))
    assert [edges(made, candidate) for candidate in made[:3]] == [
        ("lambda",),
        (),
        ("lambda",),
    ]  # two values have no middle


def test_every_method_is_offered_or_left_out_with_a_reason() -> None:
    grids, left_out = offered(8, ["gram", "fisher"], has_depth=True)
    assert {name for written in grids.values() for name, _ in written} | set(left_out) == set(registered())
    assert left_out["slerp"] == (
        "it takes a base and one model, or two models without a base; the recipe has a base and 8 models"
    )
    assert left_out["nuslerp"] == "it takes 2 models, not 8"
    assert "keeps every expert" in left_out["tall_masks"]
    without, why = offered(8, [], has_depth=False)
    assert set(grids) - set(without) == {"fisher", "regmean", "task_arithmetic | lines", "ties | lines"}
    assert "weightsmith observe" in why["regmean"]


def test_a_ledger_measures_once_and_drops_torn_lines(tmp_path: Path) -> None:
    file = tmp_path / "new" / "scores.jsonl"
    ledger = Ledger(file)
    assert ledger.get("k", lambda: {"a": 1.5}) == {"a": 1.5}
    assert ledger.get("k", lambda: {"a": math.nan}) == {"a": 1.5}
    with file.open("a") as text:
        text.write('{"key": "torn", "val')
    again = Ledger(file)
    assert again.known == {"k": {"a": 1.5}}
    again.get("torn", lambda: {"a": 2.0})
    assert Ledger(file).known == {"k": {"a": 1.5}, "torn": {"a": 2.0}}


def test_fingerprints_see_the_order_of_models() -> None:
    assert fingerprint({"a": 1, "b": 2}) != fingerprint({"b": 2, "a": 1})
    assert fingerprint([1.0]) == fingerprint((1.0,))
