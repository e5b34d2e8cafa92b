"""The trials of tests/reliability, by the hundred: `make torture`."""

from __future__ import annotations

import itertools

import pytest

from reliability.test_matrix import LAYOUTS, NAMES, RUNNERS, SIZES, check, merged
from reliability.trials import ERRORS, calls_of, end_at, fail_at, fail_resume_at, kill_anywhere

SCENES = [("tiny", False), ("tiny", True), ("torch", False), ("torch", True)]


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("name", ["wide", "torch"])
def test_kill_anywhere(zygote, scenes, tmp_path, note, name, old):
    note("SIGKILL at random moments", kill_anywhere(zygote, scenes[name], tmp_path, 80, 7, old=old))


@pytest.mark.parametrize(("name", "old"), SCENES)
@pytest.mark.parametrize(("kind", "what"), [("kill", "SIGKILL at a call"), ("torn", "SIGKILL in a write")])
def test_kill_at_every_call(zygote, scenes, tmp_path, note, name, old, kind, what):
    count = calls_of(zygote, scenes[name], tmp_path, old)
    note(what, end_at(zygote, scenes[name], tmp_path, kind, range(1, count + 1), old=old))


@pytest.mark.parametrize(("name", "old"), SCENES)
def test_power_cut_at_every_call(zygote, scenes, tmp_path, note, name, old):
    count = calls_of(zygote, scenes[name], tmp_path, old)
    note("power cuts", end_at(zygote, scenes[name], tmp_path, "power", range(1, count + 1), old=old, interval=0.0))


@pytest.mark.parametrize(("name", "old"), SCENES)
def test_every_call_fails_in_every_way(zygote, scenes, tmp_path, note, name, old):
    count = calls_of(zygote, scenes[name], tmp_path, old)
    cases = itertools.product(range(1, count + 1), ERRORS)
    note("failing calls", fail_at(zygote, scenes[name], tmp_path, cases, old=old))


@pytest.mark.parametrize("name", ["tiny", "torch"])
def test_every_call_of_a_resumed_run_fails_in_every_way(zygote, scenes, tmp_path, note, name):
    count = calls_of(zygote, scenes[name], tmp_path)
    cases = itertools.product(range(1, count + 1), ERRORS)
    note("failing calls of a resumed run", fail_resume_at(zygote, scenes[name], tmp_path, cases))


@pytest.mark.parametrize("name", NAMES)
def test_whole_matrix(name, memory, layouts, tmp_path):
    """Every layout x shard size x runner, all models in one layout."""
    expected = merged(name, memory)
    for save, size, (turn, runner) in itertools.product(LAYOUTS, SIZES, enumerate(RUNNERS)):
        out = tmp_path / f"{save.__name__}-{size}-{turn}"
        assert check(name, layouts[save.__name__], size, runner, out) == expected
