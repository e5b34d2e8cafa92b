"""The formulas behind the tables, on numbers worked out by hand."""

from __future__ import annotations

import datetime

import pytest
from demo.results import Result, markdown_page
from demo.table import Reference, row, verdict

DIGITS = Reference(base={"a": 80.0, "b": 60.0, "clean": 90.0}, expert={"a": 90.0, "b": 80.0}, higher_is_better=True)
TEXT = Reference(base={"a": 3.0, "b": 2.0}, expert={"a": 2.0, "b": 1.0}, higher_is_better=False)


def test_the_base_keeps_nothing_and_the_experts_together_everything() -> None:
    assert DIGITS.gain_kept(DIGITS.base) == 0
    assert DIGITS.gain_kept(DIGITS.expert) == 1
    assert TEXT.gain_kept(TEXT.base) == 0
    assert TEXT.gain_kept(TEXT.expert) == 1


def test_gain_kept_is_the_mean_of_the_tasks_shares() -> None:
    assert DIGITS.gain_kept({"a": 85.0, "b": 65.0}) == pytest.approx((5 / 10 + 5 / 20) / 2)
    assert TEXT.gain_kept({"a": 2.5, "b": 2.25}) == pytest.approx((0.5 - 0.25) / 2)


def test_normalised_is_at_most_one_below_the_expert_whichever_way_is_better() -> None:
    assert DIGITS.normalised({"a": 81.0, "b": 80.0}) == pytest.approx((0.9 + 1) / 2)
    assert TEXT.normalised({"a": 2.5, "b": 1.0}) == pytest.approx((2 / 2.5 + 1) / 2)


def test_forgetting_on_a_guard_is_the_loss_against_the_base() -> None:
    assert DIGITS.forgetting({"clean": 87.5}, ["clean"]) == 2.5
    assert DIGITS.forgetting({"clean": 91.0}, ["clean"]) == -1.0


def test_forgetting_without_guards_counts_only_what_got_worse() -> None:
    assert TEXT.forgetting({"a": 3.5, "b": 1.0}, []) == pytest.approx(0.25)
    assert TEXT.forgetting({"a": 2.0, "b": 1.0}, []) == 0


def test_a_row_is_the_mean_over_the_seeds_with_the_spread_of_the_gain() -> None:
    models = [{"a": 85.0, "b": 70.0, "clean": 90.0}, {"a": 90.0, "b": 80.0, "clean": 88.0}]
    made = row("m", "merge", models, [DIGITS, DIGITS], ["clean"], "lambda 1")
    assert made.tasks == {"a": 87.5, "b": 75.0}
    assert made.score == 81.25
    assert made.gain_kept == pytest.approx(0.75)
    assert made.spread == pytest.approx(0.5 / 2**0.5)  # of 0.5 and 1.0, with n - 1
    assert made.forgetting == 1.0
    assert made.verdict == "above base"


def test_one_seed_has_no_spread() -> None:
    assert row("m", "merge", [TEXT.expert], [TEXT], []).spread is None


def test_a_merge_that_does_not_beat_the_base_is_called_so() -> None:
    worse = {"a": 3.1, "b": 2.0}
    assert row("m", "merge", [worse], [TEXT], []).verdict == "below base"
    assert row("m", "merge", [TEXT.base], [TEXT], []).verdict == "below base"  # no better is not above
    assert row("m", "merge", [DIGITS.base], [DIGITS], []).verdict == "below base"
    assert row("base", "base", [TEXT.base], [TEXT], []).verdict == ""
    assert verdict(3, 4) == "below base in 1 of 4"


def test_the_page_of_the_documentation_says_when_and_holds_every_row() -> None:
    rows = (
        row("base", "base", [DIGITS.base], [DIGITS], []),
        row("TIES", "merge", [DIGITS.expert], [DIGITS], [], "x 1"),
    )
    result = Result("digits", "Digits", "About.", "accuracy, %", True, "points", ("a", "b"), 1, rows, {})
    page = markdown_page([result])
    assert page.startswith("# What the demo measured\n")
    assert str(datetime.date.today()) in page
    assert "## Digits\n\nAbout.\n\n| model | a | b |" in page
    assert "| **TIES** | **90.0** | **80.0** | **85.0** | **100.0%** | **100%** |" in page
