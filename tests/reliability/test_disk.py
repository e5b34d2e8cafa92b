"""Full disks and bad sectors, real ones where the system lets us have them."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from reliability.runs import digest, finish, state
from reliability.trials import kill_where, new_place, tasks_in
from weightsmith.core.errors import OutputError
from weightsmith.core.keys import Key
from weightsmith.io.write.output import FolderSink


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB of its own; without the right to mount one, None."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], check=False, capture_output=True
    )
    if mounted.returncode:
        yield None
        return
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(zygote, scenes, tmp_path, small_disk, note):
    """The plan sees that it will not fit; a disk that fills up later stops the run, which goes on with more room."""
    scene = scenes["wide"]
    if small_disk is None:  # the nearest thing that needs no rights: no file may grow beyond a size
        place, _, _ = new_place(tmp_path, False)
        ended = zygote.run(scene.argv(place), patch={"limit": 500_000})
        assert "File too large; no file may be this large here; choose a smaller output.shard_size" in ended.stderr
        assert list(place.iterdir()) == []
        finish(zygote, scene, place)
        return
    ended = zygote.run(scene.argv(small_disk))
    assert ended.code == 2
    assert "free some space or choose another folder" in ended.stderr
    assert list(small_disk.iterdir()) == []

    scene = scenes["tiny"]
    kill_where(zygote, scene, small_disk / "warm", 1)
    shutil.rmtree(small_disk / "warm")
    seen = Counter()
    for kept in (0, 4096, 8192, 12288, 16384, 20480, 28672, 40960):
        place = small_disk / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        ballast = small_disk / "ballast"
        with ballast.open("wb") as file:
            file.truncate(0)
            free = shutil.disk_usage(small_disk).free
            file.write(b"x" * (free - kept))
        ended = zygote.run(scene.argv(place))
        seen[f"then {state(place, scene)}, exit {ended.code}"] += 1
        if ended.code:
            assert "No space left on device" in ended.stderr or "free some space" in ended.stderr, ended
            assert ended.stderr.count("\n") == 1
        ballast.unlink()
        finish(zygote, scene, place)
    assert any("absent" in word for word in seen)
    note("full disks (real)", seen)


def test_no_file_may_grow(zygote, scenes, tmp_path):
    """RLIMIT_FSIZE, of the system itself, at sizes that stop a shard, the journal and the manifest."""
    place, _, _ = new_place(tmp_path, False)
    assert zygote.run(scenes["tiny"].argv(place)).code == 0
    largest = max(path.stat().st_size for path in (place / "out").iterdir())
    for limit in (400, 900, largest - 1):
        place, _, _ = new_place(tmp_path, False)
        ended = zygote.run(scenes["tiny"].argv(place), patch={"limit": limit})
        assert ended.code == 2
        assert "File too large" in ended.stderr
        assert state(place, scenes["tiny"]) == "absent"
        finish(zygote, scenes["tiny"], place)


def test_a_bad_sector_in_an_input(zygote, scenes, tmp_path):
    """EIO in the middle of a tensor names file and tensor, keeps what is done, and is over when the disk is."""
    scene = scenes["wide"]
    place, _, _ = new_place(tmp_path, False)
    headers, samples = 2 * 12, 8 * 12  # of 12 files
    fault = {"kind": "EIO", "lasting": True, "at": headers + samples + 50, "only": "preadv"}
    ended = zygote.run(scene.argv(place), fault=fault)
    assert ended.code == 2
    assert ".safetensors: 'model." in ended.stderr
    assert "Input/output error" in ended.stderr
    assert state(place, scene) == "absent"
    finish(zygote, scene, place)


# --- faults that were found ------------------------------------------------------------------------


def test_a_resume_that_fails_at_once_keeps_what_was_done(zygote, scenes, tmp_path):
    """A new journal that could not be written took the whole work folder with it."""
    scene = scenes["wide"]
    place = tmp_path / "place"
    done = kill_where(zygote, scene, place, 8)
    (place / "out.partial/journal.new").mkdir()  # the name is taken: it cannot be opened
    ended = zygote.run(scene.argv(place, "--resume"))
    assert ended.code == 2
    assert tasks_in(place) == done
    (place / "out.partial/journal.new").rmdir()
    finish(zygote, scene, place)


def test_a_work_folder_half_removed_is_no_run(zygote, scenes, tmp_path):
    """`--overwrite` drops an old work folder; killed in that, it left a journal of tasks whose files were gone."""
    scene = scenes["wide"]
    place, ready = tmp_path / "place", tmp_path / "ready"
    kill_where(zygote, scene, ready, 8)
    whole = len(list(ready.rglob("*")))
    for at in range(200, 700, 3):  # to about where the removing begins
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(ready, place)
        zygote.run(scene.argv(place, "--overwrite"), fault={"kind": "kill", "at": at})
        if len(list(place.rglob("*"))) < whole:
            break
    met = Counter()
    for n in range(at - 2, at + 10):
        shutil.rmtree(place)
        shutil.copytree(ready, place)
        zygote.run(scene.argv(place, "--overwrite"), fault={"kind": "kill", "at": n})
        met[len(list(place.rglob("*")))] += 1
        finish(zygote, scene, place)
    assert len(met) > 3  # it was killed with different parts gone


def test_an_old_output_moved_away_is_not_lost_to_somebody_elses(zygote, scenes, tmp_path):
    """Killed between the two renames; then something else takes the output's name: the old output stays."""
    scene = scenes["tiny"]
    place, old, more = new_place(tmp_path, True)
    n = 1
    while state(place, scene, old) != "moved":
        place, old, more = new_place(tmp_path, True)
        n = n + 1 if n > 150 else 170
        zygote.run(scene.argv(place, *more), fault={"kind": "kill", "at": n})
    (place / "out").mkdir()
    (place / "out/mine.txt").write_text("somebody else's")
    (moved,) = place.glob("out.replaced-*")
    assert zygote.run(scene.argv(place, "--resume")).code == 2
    assert digest(moved) == old


def test_cleaning_up_that_fails_is_said_and_the_result_is_there(tmp_path, monkeypatch):
    sink = FolderSink(tmp_path / "out", shard_size=100, identity={})
    sink.begin([Key("w", (2,), "uint8")])
    sink.done("w", {})

    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("weightsmith.io.write.output.remove", fail)
    with (
        pytest.raises(OutputError, match=r"out is complete, but .*out\.partial could not be removed \(Input/output"),
        sink.finishing(),
    ):
        pass
    assert (tmp_path / "out/model.safetensors").exists()
    assert not sink._lock.held


def test_a_short_write_of_the_journal_is_continued(tmp_path, monkeypatch):
    import os

    from weightsmith.io.write.journal import Journal, read_journal

    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: whole(descriptor, bytes(data)[:5]))
    book = Journal(tmp_path / "journal.jsonl", {}, {}, lambda: None)
    book.add("t", {"x": 1})
    book.close()
    monkeypatch.undo()
    assert read_journal(tmp_path / "journal.jsonl").tasks == [("t", {"x": 1})]
