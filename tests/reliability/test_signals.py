"""Ctrl-C, SIGTERM and a closed terminal: one line, exit code 130, nothing lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from reliability.runs import digest, finish, state
from reliability.trials import new_place
from weightsmith.cli.main import _ends_cleanly
from weightsmith.io.write.lock import holder

STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", STOPS, ids=lambda n: n.name)
@pytest.mark.parametrize("name", ["wide", "torch"])
def test_stopped_at_any_moment(zygote, scenes, tmp_path, note, number, name):
    scene, chance, seen = scenes[name], random.Random(number), Counter()
    place, _, _ = new_place(tmp_path, False)
    whole = zygote.run(scene.argv(place)).seconds
    for _ in range(3):
        place, _, _ = new_place(tmp_path, False)
        ended = zygote.run(scene.argv(place), signal={"number": number, "after": chance.uniform(0.1, 0.9) * whole})
        found = state(place, scene)
        seen[f"then {found}, exit {ended.code}"] += 1
        if ended.code == 130:
            assert ended.stderr == "interrupted; continue with --resume\n"
            # A signal between making the file and locking it leaves the file, but never the lock.
            assert holder(place / "out.partial.lock") is None
        else:
            assert (ended.code, found) in ((0, "complete"), (-number, "absent")), (
                ended.stderr
            )  # before the command began
        finish(zygote, scene, place)
    note(f"{number.name}", seen)


def test_the_real_command_stops_cleanly(scenes, zygote, tmp_path):
    """A process of its own, once it has begun to write; nohup keeps its meaning."""
    scene = scenes["wide"]
    for number in STOPS:
        place, _, _ = new_place(tmp_path, False)
        command = [sys.executable, "-m", "weightsmith", *scene.argv(place)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        while not (place / "out.partial/journal.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(number)
        _, said = process.communicate()
        assert (process.returncode, said) == (130, "interrupted; continue with --resume\n")
        assert state(place, scene) == "absent"
    finish(zygote, scene, place)


def test_an_ignored_hangup_stays_ignored(scenes, tmp_path):
    """Under nohup a closed terminal does not end the run."""
    scene = scenes["tiny"]
    place, _, _ = new_place(tmp_path, False)
    code = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from weightsmith.cli.main import main\n"
        "from weightsmith.io import system\n"
        "calls = []\n"
        "def call(f, /, *a, **k):\n"
        "    calls.append(f)\n"
        "    if len(calls) == 90: os.kill(os.getpid(), signal.SIGHUP)\n"
        "    return f(*a, **k)\n"
        "system.call = call\n"
        "code = main(sys.argv[1:]); assert len(calls) > 90; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code, *scene.argv(place)], check=True)
    assert (place / "out/weightsmith.json").exists()


def test_the_clock_goes_backwards(zygote, scenes, tmp_path):
    """Nothing depends on the time of day: not the flushing, not the result, not a resumed run."""
    scene = scenes["torch"]
    for at in (60, 105, 150):
        place, _, _ = new_place(tmp_path, False)
        zygote.run(scene.argv(place), fault={"kind": "kill", "at": at}, patch={"clock": "backwards", "interval": 0.0})
        finish(zygote, scene, place, patch={"clock": "backwards"})


def test_a_run_in_one_process_lets_go_of_the_folder_when_its_end_fails(scenes, tmp_path, monkeypatch):
    """For programs that call `run` again: no lock and no open file is kept."""
    from weightsmith.core.errors import OutputError
    from weightsmith.jobs import merge
    from weightsmith.recipe.load import load

    recipe = load(scenes["tiny"].recipe)
    before = len(list(Path("/proc/self/fd").iterdir()))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weightsmith.io.disk.sync_folder", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        merge.run(recipe, tmp_path / "out")
    monkeypatch.undo()
    merge.run(recipe, tmp_path / "out", resume=True)
    assert digest(tmp_path / "out").keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 64  # files kept open for reading


def test_a_request_to_end_that_python_drops_is_made_again() -> None:
    """What is raised while a __del__ runs goes nowhere; libraries have many while they are imported."""

    class Collected:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(1000))  # the handler runs in here

    before = sys.unraisablehook

    def work() -> None:
        with _ends_cleanly():
            Collected()
            time.sleep(20)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert sys.unraisablehook is before
