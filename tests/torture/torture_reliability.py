"""The trials of tests/reliability, by the hundred: `make torture`.

In four kinds of run every call to the file system is met by a SIGKILL, by a power cut and, where it writes, by a
SIGKILL in the middle of it.  In a plain run every call fails in each of the six ways.  In the three other kinds, and
in resumed runs, every call fails too, but in one or two of the six ways, which take turns: the whole product there
would take twice the time of all of this.
"""

from __future__ import annotations

import itertools

import pytest

from matrix import CODECS, LAYOUTS, NAMES, RUNNERS, SIZES, check, merged
from reliability.trials import ERRORS, calls_of, end_at, fail_at, fail_resume_at, kill_anywhere

SCENES = [("tiny", False), ("tiny", True), ("torch", False), ("torch", True)]
PARTS = 3  # tests that a sweep is divided into, so that two workers share it


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("name", ["wide", "torch"])
def test_kill_anywhere(zygote, scenes, tmp_path, note, name, old, part):
    note("SIGKILL at random moments", kill_anywhere(zygote, scenes[name], tmp_path, 40, 7 + part, old=old))


@pytest.mark.parametrize(("name", "old"), SCENES)
def test_kill_at_every_call(zygote, scenes, tmp_path, note, name, old):
    count = calls_of(zygote, scenes[name], tmp_path, old)
    note("SIGKILL at a call", end_at(zygote, scenes[name], tmp_path, "kill", range(1, count + 1), old=old))


@pytest.mark.parametrize("writer", ["pwrite", "write"])
@pytest.mark.parametrize(("name", "old"), SCENES)
def test_kill_in_every_write(zygote, scenes, tmp_path, note, name, old, writer):
    count = calls_of(zygote, scenes[name], tmp_path, old, only=writer)
    assert count > 4
    numbers = range(1, count + 1)
    note("SIGKILL in a write", end_at(zygote, scenes[name], tmp_path, "torn", numbers, old=old, only=writer))


@pytest.mark.parametrize(("name", "old"), SCENES)
def test_power_cut_at_every_call(zygote, scenes, tmp_path, note, name, old):
    count = calls_of(zygote, scenes[name], tmp_path, old)
    note("power cuts", end_at(zygote, scenes[name], tmp_path, "power", range(1, count + 1), old=old, interval=0.0))


@pytest.mark.parametrize("kind", ERRORS)
def test_every_call_fails_in_every_way(zygote, scenes, tmp_path, note, kind):
    count = calls_of(zygote, scenes["tiny"], tmp_path)
    cases = [(n, kind) for n in range(1, count + 1)]
    note("failing calls", fail_at(zygote, scenes["tiny"], tmp_path, cases))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("name", "old"), SCENES[1:])
def test_every_call_fails(zygote, scenes, tmp_path, note, name, old, part):
    count = calls_of(zygote, scenes[name], tmp_path, old)
    cases = in_turn(count, [SCENES.index((name, old))])[part::PARTS]
    note("failing calls", fail_at(zygote, scenes[name], tmp_path, cases, old=old))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(("name", "ways"), [("tiny", [0, 3]), ("torch", [5])])
def test_every_call_of_a_resumed_run_fails(zygote, scenes, tmp_path, note, name, ways, part):
    count = calls_of(zygote, scenes[name], tmp_path)
    cases = in_turn(count, ways)[part::PARTS]
    note("failing calls of a resumed run", fail_resume_at(zygote, scenes[name], tmp_path, cases))


def in_turn(count: int, ways: list[int]) -> list[tuple[int, str]]:
    """(n, kind) for each of `count` calls: the n-th in ways n + w of the six."""
    return [(n, ERRORS[(n + way) % len(ERRORS)]) for n in range(1, count + 1) for way in ways]


@pytest.mark.parametrize("name", NAMES + CODECS)
def test_whole_matrix(name, memory, layouts, tmp_path):
    """Every layout x shard size x runner, all models in one layout."""
    expected = merged(name, memory)
    for save, size, (turn, runner) in itertools.product(LAYOUTS, SIZES, enumerate(RUNNERS)):
        out = tmp_path / f"{save.__name__}-{size}-{turn}"
        assert check(name, layouts[save.__name__], size, runner, out) == expected
