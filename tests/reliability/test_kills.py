"""kill -9 and power cuts: OUT is what it was or complete, and --resume gives the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest

from reliability.runs import digest, finish, state
from reliability.trials import calls_of, end_at, kill_anywhere, kill_where, new_place, tasks_in
from weightsmith.io.write.journal import read_journal


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_kill_anywhere(zygote, scenes, tmp_path, note, old):
    seen = kill_anywhere(zygote, scenes["wide"], tmp_path, 15, seed=old, old=old)
    note("SIGKILL at random moments", seen)


@pytest.mark.parametrize(("name", "old"), [("tiny", True), ("torch", False)])
def test_kill_instead_of_a_call(zygote, scenes, tmp_path, note, name, old):
    """A random part of all calls; the last ones, from the renames on, every time."""
    count = calls_of(zygote, scenes[name], tmp_path, old)
    numbers = sorted({*random.Random(0).sample(range(1, count + 1), 8), *(range(count - 48, count - 4) if old else ())})
    seen = end_at(zygote, scenes[name], tmp_path, "kill", numbers, old=old)
    assert not old or {"then old", "then moved", "then complete"} <= set(seen)  # every moment of the swap was met
    note("SIGKILL at a call", seen)


def test_kill_in_the_middle_of_a_write(zygote, scenes, tmp_path, note):
    count = calls_of(zygote, scenes["tiny"], tmp_path)
    note("SIGKILL in a write", end_at(zygote, scenes["tiny"], tmp_path, "torn", range(50, count, 23)))


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_power_cut(zygote, scenes, tmp_path, note, old):
    """What was not flushed is lost, in part or as a whole; so what counts is what a flush has covered."""
    count = calls_of(zygote, scenes["torch"], tmp_path, old)
    seen = Counter()
    for interval, first in ((0.0, 60), (1e9, 66 + 7 * old)):  # flushed after every task; only at the end
        numbers = range(first, count, 29)
        seen += end_at(zygote, scenes["torch"], tmp_path, "power", numbers, old=old, interval=interval)
    note("power cuts", seen)


def test_damaged_end_of_the_journal(zygote, scenes, tmp_path, note):
    scene, ready = scenes["wide"], tmp_path / "ready"
    done = kill_where(zygote, scene, ready, 6)
    data = (ready / "out.partial/journal.jsonl").read_bytes()
    for damaged in (
        data + b"\0" * 4096,
        data + b'{"xxh3":"',
        data + b"\xff" * 100,
        data[:-200] + b"\0" * 200,
        data[:-3],
    ):
        place, _, _ = new_place(tmp_path, False)
        shutil.copytree(ready, place, dirs_exist_ok=True)
        path = place / "out.partial/journal.jsonl"
        path.write_bytes(damaged)
        kept = len(read_journal(path).tasks)
        assert kept == done if len(damaged) > len(data) else 0 < kept < done
        finish(zygote, scene, place)
        note("journals with a damaged end", Counter(resumed=1))


def test_the_same_kill_again_and_again(zygote, scenes, tmp_path):
    """A run that is killed after every few tasks gets through: each goes on where the last one stopped."""
    scene = scenes["wide"]
    # Only results are written by pwrite: how many calls the start takes, and a resume, says nothing about the tasks.
    place, _, _ = new_place(tmp_path, False)
    done = []
    for _ in range(40):
        ended = zygote.run(scene.argv(place, "--resume"), fault={"kind": "kill", "at": 8, "only": "pwrite"})
        if ended.code == 0:
            break
        done.append(tasks_in(place))
    assert done == sorted(done)
    assert len(set(done)) > 2
    finish(zygote, scene, place)


def test_kill_of_the_real_command(scenes, zygote, tmp_path, note):
    """Not forked: a process of its own, killed once it has begun to write."""
    scene, chance, seen = scenes["wide"], random.Random(5), Counter()
    place, _, _ = new_place(tmp_path, False)
    command = [sys.executable, "-m", "weightsmith", *scene.argv(place, "--resume")]
    for _ in range(2):
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not (place / "out.partial/journal.jsonl").exists() and process.poll() is None:
            pass
        try:
            process.wait(chance.uniform(0, 0.3))
        except subprocess.TimeoutExpired:
            process.kill()
        seen["kills"] += process.wait() == -signal.SIGKILL
        state(place, scene)
    assert subprocess.run(command, check=False).returncode == 0
    assert digest(place / "out") == scene.result
    note("SIGKILL of the real command", seen)
