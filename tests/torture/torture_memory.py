"""Predicted against measured memory on large tensors and many experts: minutes, so not in `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from run.peaks import methods
from run.test_memory import BELOW, ELEMENT, NEAR, far, measured, whole_process

LARGE = [(2048, 2048), (4096, 1024), (1024, 4096)]


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("name", methods())
def test_predicted_peak_of_every_method(name: str, shape: tuple[int, int]) -> None:
    assert far(measured(*shape, 3, [name])) == {}


@pytest.mark.parametrize("experts", [12, 48])
@pytest.mark.parametrize("name", methods())
def test_predicted_peak_for_many_experts(name: str, experts: int) -> None:
    assert far(measured(512, 512, experts, [name])) == {}


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "multislerp", "breadcrumbs"])
def test_an_embedding_of_131072_x_8192(method: str, tmp_path: Path) -> None:
    """Eight gigabytes of zeros are read and two are written, in less than 400 MB."""
    assert method in ELEMENT
    predicted, used = whole_process({"model.embed_tokens.weight": (131_072, 8192)}, 3, method, tmp_path)
    assert predicted < 400_000_000
    assert BELOW < predicted / used < NEAR
