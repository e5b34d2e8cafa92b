"""Predicted against measured memory on large tensors and many experts: minutes, so not in `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from run.peaks import methods
from run.test_memory import BELOW, ELEMENT, NEAR, far, measured, whole_process
from weightsmith.core.method import registered
from weightsmith.plan.cost import stage_seconds
from weightsmith.plan.costs import costs_of

SHAPES = [(2048, 2048, 3), (4096, 1024, 3), (1024, 4096, 3), (512, 512, 12), (512, 512, 48)]
PARTS = 6
"""Processes per shape, each with some of the methods: starting one takes longer than most of its cases."""


def dealt(part: int) -> list[str]:
    """Methods of every cost, the dearest first, so that all parts take about as long."""
    known = registered()
    by_cost = sorted(methods(), key=lambda name: -(stage_seconds(costs_of(known[name]), 1e9, 2048) or 0.0))
    return by_cost[part::PARTS]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_predicted_peak_of_every_method(shape: tuple[int, int, int], part: int) -> None:
    found = measured(*shape, dealt(part))
    assert list(found) == dealt(part)
    assert far(found) == {}


def test_no_method_is_left_out() -> None:
    assert sorted(name for part in range(PARTS) for name in dealt(part)) == methods()


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "multislerp", "breadcrumbs"])
def test_an_embedding_of_131072_x_8192(method: str, tmp_path: Path) -> None:
    """Eight gigabytes of zeros are read and two are written, in less than 400 MB."""
    assert method in ELEMENT
    predicted, used = whole_process({"model.embed_tokens.weight": (131_072, 8192)}, 3, method, tmp_path)
    assert predicted < 400_000_000
    assert BELOW < predicted / used < NEAR
