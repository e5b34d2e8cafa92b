"""All commands that write a folder are as hard to hurt as merge: the same trials, a part of them."""

from __future__ import annotations

import itertools
import random

import pytest

from reliability.trials import ERRORS, calls_of, end_at, fail_at

WRITERS = ["compress", "restore", "sweep", "moe", "lora", "transplant"]
KINDS = itertools.cycle(ERRORS)


def test_every_writer_is_here(writers):
    assert sorted(writers) == sorted(WRITERS)


@pytest.mark.parametrize("name", WRITERS)
def test_kills_and_power_cuts(zygote, writers, tmp_path, note, name):
    scene, chance = writers[name], random.Random(name)
    count = calls_of(zygote, scene, tmp_path)
    killed = [*chance.sample(range(1, count), 3), count - chance.randrange(12)]
    note("SIGKILL at a call of another command", end_at(zygote, scene, tmp_path, "kill", killed))
    cut = chance.sample(range(count // 3, count), 2)
    note("power cuts of another command", end_at(zygote, scene, tmp_path, "power", cut, interval=0.0))


@pytest.mark.parametrize("name", WRITERS)
def test_failing_calls(zygote, writers, tmp_path, note, name):
    count = calls_of(zygote, writers[name], tmp_path)
    cases = [(n, next(KINDS)) for n in random.Random(name).sample(range(1, count + 1), 6)]
    note("failing calls of another command", fail_at(zygote, writers[name], tmp_path, cases))
