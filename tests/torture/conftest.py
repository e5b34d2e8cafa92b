"""The fixtures of tests/reliability, and its figures at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from matrix import layouts, memory
from reliability.conftest import note, pytest_terminal_summary, scenes, writers, zygote

__all__ = ["layouts", "memory", "note", "pytest_terminal_summary", "scenes", "tmp_path", "writers",
           "zygote"]  # fmt: skip

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where the system has one: thousands of runs flush a dozen files each.

    What a disk may lose is played by faults.py; it does not depend on the disk below.
    """
    roomy = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 1 << 30
    place = Path(tempfile.mkdtemp(prefix="weightsmith-", dir=MEMORY if roomy else None))
    yield place
    shutil.rmtree(place)
