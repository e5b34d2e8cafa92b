"""The trials of tests/reliability/test_writers.py at every call: `make torture`."""

from __future__ import annotations

import pytest

from reliability.test_writers import WRITERS
from reliability.trials import calls_of, end_at, fail_at
from torture.torture_reliability import in_turn


@pytest.mark.parametrize("name", WRITERS)
def test_kill_at_every_call(zygote, writers, tmp_path, note, name):
    count = calls_of(zygote, writers[name], tmp_path)
    note("SIGKILL at a call of another command", end_at(zygote, writers[name], tmp_path, "kill", range(1, count + 1)))


@pytest.mark.parametrize("writer", ["pwrite", "write"])
@pytest.mark.parametrize("name", WRITERS)
def test_kill_in_every_write(zygote, writers, tmp_path, note, name, writer):
    count = calls_of(zygote, writers[name], tmp_path, only=writer)
    numbers = range(1, count + 1)
    note("SIGKILL in a write of another command", end_at(zygote, writers[name], tmp_path, "torn", numbers, only=writer))


@pytest.mark.parametrize("name", WRITERS)
def test_power_cuts(zygote, writers, tmp_path, note, name):
    count = calls_of(zygote, writers[name], tmp_path)
    numbers = range(1, count + 1, 3)
    note("power cuts of another command", end_at(zygote, writers[name], tmp_path, "power", numbers, interval=0.0))


@pytest.mark.parametrize("name", WRITERS)
def test_every_call_fails(zygote, writers, tmp_path, note, name):
    cases = in_turn(calls_of(zygote, writers[name], tmp_path), [WRITERS.index(name)])
    note("failing calls of another command", fail_at(zygote, writers[name], tmp_path, cases))
