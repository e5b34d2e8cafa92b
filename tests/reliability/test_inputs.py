"""What a run may count on: its inputs stay as they are, a resumed run is the same run, nobody else writes there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from reliability.runs import digest, finish, state
from reliability.trials import kill_where, new_place
from weightsmith.core.errors import SourceError
from weightsmith.io.read.files import File
from weightsmith.io.read.pickle import PickleSource
from weightsmith.io.read.safetensors import SafetensorsSource


@pytest.fixture
def own(scenes, zygote, tmp_path):
    """A scene whose inputs this test may change, and where it merges."""
    scene = scenes["tiny"]
    folder = tmp_path / "inputs"
    shutil.copytree(scene.folder, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(scene.folder), str(folder)))
    scene, (place, _, _) = replace(scene, folder=folder, recipe=recipe), new_place(tmp_path, False)
    assert zygote.run(scene.argv(place)).code == 0
    scene = replace(scene, result=digest(place / "out"))  # the manifest names the inputs' folders
    return scene, new_place(tmp_path, False)[0]


def rewrite(path: Path) -> None:
    """One bit flips, in place."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)


def exchange(path: Path) -> None:
    """Another file of the same size takes its place, with the same times."""
    status, fresh = path.stat(), path.with_name("fresh")
    shutil.copyfile(path, fresh)
    rewrite(fresh)
    os.utime(fresh, ns=(status.st_atime_ns, status.st_mtime_ns))
    fresh.replace(path)


@pytest.mark.parametrize("change", [rewrite, exchange, Path.unlink], ids=["rewritten", "exchanged", "removed"])
@pytest.mark.parametrize("number", [3, 11, 20])
def test_inputs_that_change_during_the_run(own, change, number):
    """Wherever the run is: it ends before anything becomes visible, and names the input and the file."""
    scene, place = own
    argv = [sys.executable, "-c", STOP_AT, str(number), *scene.argv(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    wait_until_stopped(process.pid)
    change(scene.folder / "code/model.safetensors")
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate()
    assert process.returncode == 2, said
    assert f"{scene.folder / 'code/model.safetensors'}: " in said
    assert "start again" in said
    assert said.count("\n") == 1
    if number == 20:  # all reading is done: only the look at the end can tell
        assert said.startswith("error: input 'code': ")
    assert not (place / "out").exists()


STOP_AT = """
import os, signal, sys
from weightsmith.cli.main import main
from weightsmith.io import system
count, at = 0, int(sys.argv[1])
def call(function, /, *args, **kwargs):
    # From the lock on: how many calls come before says nothing about the run.
    global count
    count += bool(count or getattr(function, "__name__", "") == "flock")
    if count == at + 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return function(*args, **kwargs)
system.call = call
sys.exit(main(sys.argv[2:]))
"""


def wait_until_stopped(pid: int) -> None:
    for _ in range(3000):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.01)
    raise AssertionError("it does not stop")


@pytest.mark.parametrize("change", [rewrite, exchange])
def test_a_source_notices_though_its_file_is_still_open(own, change):
    """A descriptor that was kept open reads on, in an old file or a changed one; the fingerprint looks again."""
    scene, _ = own
    path = scene.folder / "math/model.safetensors"
    source = SafetensorsSource(path)
    before = source.fingerprint()
    assert source.fingerprint() == before
    change(path)
    with pytest.raises(SourceError, match=r"math/model\.safetensors: was changed or exchanged since it was opened"):
        source.fingerprint()


def test_a_pickle_notices(own, tmp_path):
    import torch

    torch.save({"w": torch.ones(3)}, tmp_path / "w.bin")
    source = PickleSource(tmp_path / "w.bin")
    source.fingerprint()
    rewrite(tmp_path / "w.bin")
    with pytest.raises(SourceError, match="was changed or exchanged"):
        source.fingerprint()


def test_a_file_seen_from_another_machine_may_have_other_numbers(own):
    """Inode numbers differ between mounts, so a pickled File does not compare them; size and time it does."""
    import pickle

    path = own[0].folder / "math/model.safetensors"
    file = pickle.loads(pickle.dumps(File(path)))
    exchange(path)
    file.refuse_changed()
    path.write_bytes(b"")
    with pytest.raises(SourceError, match="was changed"):
        file.refuse_changed()


# --- resuming --------------------------------------------------------------------------------------


def edit_recipe(scene):
    scene.recipe.write_text(scene.recipe.read_text().replace("method: ties", "method: {ties: {density: 0.3}}"))


def edit_input(scene):
    os.utime(scene.folder / "law/model.safetensors", ns=(1, 1))


def edit_order(scene):
    text = scene.recipe.read_text()
    lines = text.splitlines(keepends=True)
    lines[2], lines[3] = lines[3], lines[2]
    scene.recipe.write_text("".join(lines))


def edit_shards(scene):
    scene.recipe.write_text(scene.recipe.read_text().replace("700B", "900B"))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (edit_recipe, "recipe (method) changed"),
        (edit_input, "input 'law' changed"),
        (edit_order, "recipe (models)"),
        (edit_shards, "recipe (output) changed"),
    ],
)
def test_resume_refuses_another_run_and_says_what_differs(zygote, own, edit, text):
    scene, place = own
    kill_where(zygote, scene, place, 1)
    before = scene.recipe.read_text()
    edit(scene)
    ended = zygote.run(scene.argv(place, "--resume"))
    assert ended.code == 2
    assert text in ended.stderr
    assert ended.stderr.endswith("pass --overwrite to start anew\n")
    assert (place / "out.partial/files").exists()
    scene.recipe.write_text(before)
    if edit is not edit_input:
        assert zygote.run(scene.argv(place, "--resume")).code == 0


def test_resume_refuses_another_version(zygote, own):
    scene, place = own
    kill_where(zygote, scene, place, 1)
    ended = zygote.run(scene.argv(place, "--resume"), patch={"version": "9.9"})
    assert ended.code == 2
    assert "version (0.1.0 -> 9.9) changed; pass --overwrite to start anew" in ended.stderr


def test_resume_of_what_is_complete_is_no_error_and_changes_nothing(zygote, scenes, tmp_path):
    """A script that repeats a command until it succeeds must come to an end."""
    scene = scenes["tiny"]
    place, _, _ = new_place(tmp_path, False)
    finish(zygote, scene, place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    finish(zygote, scene, place)
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert zygote.run(scene.argv(place)).code == 2  # without --resume it is somebody's output
    other = [*scene.argv(place, "--resume"), "--set", "seed=3"]
    assert zygote.run(other).code == 2  # another recipe's result is not this one's


# --- two writers -----------------------------------------------------------------------------------


def test_a_second_run_says_who_holds_the_folder(zygote, scenes, tmp_path):
    scene = scenes["tiny"]
    place, _, _ = new_place(tmp_path, False)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", STOP_AT, "3", *scene.argv(place)]
    first = subprocess.Popen(argv, env=environment)
    wait_until_stopped(first.pid)
    held = json.loads((place / "out.partial.lock").read_text())
    for more in ((), ("--resume",), ("--overwrite",)):
        ended = zygote.run(scene.argv(place, *more))
        assert ended.code == 2
        assert f"is in use by process {first.pid} on host {held['host']} since {held['started']}" in ended.stderr
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert state(place, scene) == "complete"
