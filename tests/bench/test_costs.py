"""The table of costs is written from measurements: what agrees stays, what does not is covered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import costs
from weightsmith.core.costs import Costs
from weightsmith.plan.costs import TABLE, table

MB = 1e6
SIZES = [(9 * MB, 3 * MB, 3 * MB), (27 * MB, 3 * MB, 3 * MB), (12 * MB, 4 * MB, 1 * MB), (18 * MB, 6 * MB, 1 * MB)]
"""Bytes of the stack, of one matrix and of a square."""


def agreement(scratch: float, matrix: float, square: float, ratio: float, seconds: float = 10.0) -> costs.Agreement:
    needed = [scratch * a + matrix * b + square * c for a, b, c in SIZES]
    return costs.Agreement([ratio] * len(SIZES), SIZES, needed, seconds)


@pytest.mark.parametrize("truth", [(1.5, 0.0, 0.0), (0.0, 2.3, 4.1), (0.5, 1.2, 3.3)])
def test_a_fit_covers_what_was_measured_and_little_more(truth: tuple[float, float, float]) -> None:
    found = costs.fitted(Costs(side="columns", histograms=2), agreement(*truth, ratio=0.5))
    assert (found.scratch, found.matrix, found.square) == pytest.approx(truth, abs=0.11)
    assert all(a >= b - 1e-6 for a, b in zip((found.scratch, found.matrix, found.square), truth, strict=True))
    assert (found.side, found.histograms) == ("columns", 2)


def test_a_row_that_agrees_stays() -> None:
    row = Costs(scratch=2.0, seconds=12.0)
    assert costs.revised(row, agreement(1.9, 0.0, 0.0, ratio=1.05), speed=1.0) == row
    counted = agreement(2.1, 0.0, 0.0, ratio=1.05)
    counted = replace(counted, features=[*SIZES, *SIZES], needed=[*counted.needed, *counted.needed])
    assert costs.revised(row, counted, speed=1.0).scratch == 2.1  # near for a process, but not enough for the tensors
    assert costs.revised(row, agreement(2.2, 0.0, 0.0, ratio=0.90), speed=1.0).scratch == 2.2  # too little was promised
    assert costs.revised(row, agreement(1.9, 0.0, 0.0, ratio=1.05, seconds=20.0), speed=2.0).seconds == 40.0


def test_blocks_are_fitted_by_their_tensors_alone() -> None:
    counted = [(2 * MB, MB, MB), (4 * MB, MB, MB)]
    needed = [2.5 * a + 1.2 * b for a, b, _ in counted]
    found = costs.Agreement([1.1] * len(SIZES), [*SIZES, *counted], [-MB] * len(SIZES) + needed, 1.0, blocks=True)
    made = costs.fitted(Costs(), found)
    assert (made.scratch, made.matrix, made.square) == pytest.approx((2.5, 1.2, 0.0), abs=0.11)


def test_a_new_row_is_fitted_and_timed() -> None:
    found = costs.revised(Costs(), agreement(1.5, 2.0, 0.0, ratio=0.2, seconds=7.0), speed=2.0)
    assert (found.scratch, found.matrix, found.square, found.seconds) == pytest.approx((1.5, 2.0, 0.0, 14.0), abs=0.11)


def test_the_table_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "TABLE", tmp_path / "costs.json")
    costs.write(table())
    written = (tmp_path / "costs.json").read_text()
    assert {name: Costs(**row) for name, row in json.loads(written).items()} == dict(table())
    assert written == TABLE.read_text()
