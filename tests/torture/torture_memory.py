"""Predicted against measured memory for every registered method, filter and codec: minutes, so not in `make test`."""

from __future__ import annotations

import pytest

from run.peaks import methods
from run.test_memory import NEAR, measured


@pytest.mark.parametrize("name", methods())
def test_predicted_peak_of_every_method(name: str) -> None:
    (ratio,) = measured(1024, 3, [name]).values()
    assert 1 / NEAR < ratio < NEAR
