"""Statistics, one file each: whichever call of writing one fails or is the last, the old file or the new is there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reliability.faults import Calls
from reliability.trials import ERRORS
from safety.refusal import outcome
from weightsmith.core.errors import OutputError
from weightsmith.io import system
from weightsmith.io.read.stats import StatsSource
from weightsmith.observe.files import Statistic, stat_path, write_statistic

STORY = {"examples": 3, "model": "m"}


def made(value: float) -> Statistic:
    return Statistic({"b": torch.full((3, 2), value), "a": torch.full((4,), value), "s": torch.tensor(value)}, rows=5)


def written(out: Path, value: float) -> bytes:
    write_statistic(out, "gram", made(value), STORY)
    return stat_path(out, "gram").read_bytes()


def in_child(work: Callable[[], object]) -> int:
    """Do it in a process of its own; how that ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def with_fault(out: Path, value: float, **fault: object) -> Calls:
    system.call = calls = Calls(fault)
    write_statistic(out, "gram", made(value), STORY)
    return calls


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(system, "call", system.call)  # put back at the end
    return with_fault(tmp_path / "counted", 1.0).count


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written(tmp_path / "out", 2.0)
    source = StatsSource(tmp_path / "out" / "gram.safetensors")
    assert (source.stat, source.rows, source.examples) == ("gram", 5, 3)
    assert source.read("b").tolist() == [[2, 2]] * 3
    assert source.read("s").item() == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gram.safetensors"]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_call_fails(calls: int, tmp_path: Path, kind: str) -> None:
    old, new = written(tmp_path / "old", 1.0), written(tmp_path / "new", 2.0)
    name, lasting = kind.removesuffix(" for good"), kind.endswith("for good")
    for n in range(1, calls + 1):
        out = tmp_path / f"{n}"
        written(out, 1.0)
        _, said = outcome(lambda out=out, n=n: with_fault(out, 2.0, kind=name, at=n, lasting=lasting))
        assert said or stat_path(out, "gram").read_bytes() == new
        assert said.count("\n") == 0
        system.call = lambda function, /, *args, **kwargs: function(*args, **kwargs)
        assert stat_path(out, "gram").read_bytes() in (old, new)
        assert written(out, 2.0) == new
        assert [path.name for path in out.iterdir()] == ["gram.safetensors"]


@pytest.mark.parametrize("kind", ["kill", "torn", "power"])
def test_every_call_is_the_last(calls: int, tmp_path: Path, kind: str) -> None:
    old, new = written(tmp_path / "old", 1.0), written(tmp_path / "new", 2.0)
    killed = 0
    for n in range(1, calls + 1):
        out = tmp_path / f"{n}"
        written(out, 1.0)
        killed += in_child(lambda out=out, n=n: with_fault(out, 2.0, kind=kind, at=n, seed=n)) == -signal.SIGKILL
        assert stat_path(out, "gram").read_bytes() in (old, new)
        assert written(out, 2.0) == new
        assert [path.name for path in out.iterdir()] == ["gram.safetensors"]
    assert killed > (0 if kind == "torn" else calls - 2)


def test_a_second_writer_is_told(tmp_path: Path) -> None:
    from weightsmith.io.write.lock import FolderLock

    written(tmp_path, 1.0)
    lock = FolderLock(tmp_path / ".gram.safetensors.lock", tmp_path)
    lock.acquire()
    with pytest.raises(OutputError, match=f"gram.safetensors is in use by process {os.getpid()}"):
        write_statistic(tmp_path, "gram", made(2.0), STORY)
    lock.release()
