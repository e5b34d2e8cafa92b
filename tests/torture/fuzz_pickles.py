"""Every hostile pickle of tests/safety in every kind of file: `make torture`."""

from __future__ import annotations

from pathlib import Path

import pytest

from safety import hostile_pickles as hostile
from safety.refusal import outcome
from weightsmith.io.read.open import open_source


@pytest.mark.parametrize("protocol", hostile.PROTOCOLS)
def test_nothing_is_run(protocol: int, tmp_path: Path) -> None:
    path, canary = tmp_path / "model.bin", tmp_path / "canary"
    tried = 0
    for data in hostile.corpus(canary, protocol, whole=True):
        path.write_bytes(data)
        source, _ = outcome(lambda: open_source(path))
        assert source is None
        assert not canary.exists()
        tried += 1
    assert tried > 2000
