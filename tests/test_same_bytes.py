"""Outputs have the bytes that were recorded: every method, filter, codec and verb, with the kernels and without."""

from __future__ import annotations

import pytest

from same_bytes.record import MODES, differences, report


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_outputs_have_the_bytes_recorded(mode: str) -> None:
    lines = differences(mode)
    assert not lines, report(mode, lines)
