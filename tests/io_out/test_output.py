"""The output folder: layout, resume, overwrite, and what stands in the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kit import texts
from weightsmith.core.errors import OutputError
from weightsmith.core.keys import DTYPES, Key
from weightsmith.io.read.source import tensor_to_bits
from weightsmith.io.write import output
from weightsmith.io.write.layout import plan_shards
from weightsmith.io.write.output import check_output

# --- layout ----------------------------------------------------------------------------------------


def test_one_shard_has_the_plain_name(job, out):
    job.write(out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["merged"]
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    job.check(out)


def test_several_shards_and_their_index(job, out):
    job.write(out, shard_size=70)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert index["metadata"]["total_size"] == sum(key.nbytes for key in job.keys)
    assert sorted(index["weight_map"]) == sorted(key.name for key in job.keys)
    assert sorted(set(index["weight_map"].values())) == files
    job.check(out)


def test_shards_fill_in_order_and_a_large_tensor_has_one_to_itself():
    sizes = [40, 60, 1, 500, 30, 30, 30, 30]
    keys = [Key(f"t{i}", (size,), "uint8") for i, size in enumerate(sizes)]
    shards = plan_shards(keys, 100, "model", {})
    assert [[key.numel for key in shard.keys.values()] for shard in shards] == [[40, 60], [1], [500], [30] * 3, [30]]


def test_data_starts_at_8_and_every_tensor_at_its_item_size(job):
    for limit in (10**9, 70, 1):
        for shard in plan_shards(job.keys, limit, "model", {"format": "pt"}):
            assert len(shard.header) % 8 == 0
            for name, offset in shard.offsets.items():
                assert offset % DTYPES[shard.keys[name].dtype].itemsize == 0


@pytest.mark.parametrize("shard_size", [10**9, 5_000])
def test_transformers_loads_it(out, shard_size):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    state = model.state_dict()
    sink = output.FolderSink(out, shard_size=shard_size, identity={})
    sink.begin([Key(name, tuple(tensor.shape), "float32") for name, tensor in state.items()])
    for name, tensor in state.items():
        sink.write(name, 0, tensor_to_bits(tensor))
    config.architectures = ["LlamaForCausalLM"]
    with sink.finishing() as folder:
        config.save_pretrained(folder)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard_size < 10**9)
    loaded, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("names", "text"),
    [(["a", "a"], "used twice"), (["__metadata__"], "reserved"), (["a\ud800"], "no valid text")],
)
def test_names_that_cannot_be_stored(out, job, names, text):
    with pytest.raises(OutputError, match=text):
        job.sink(out).begin([Key(name, (1,), "uint8") for name in names])
    assert not list(out.parent.iterdir())


def test_a_name_used_in_two_shards(out, job):
    with pytest.raises(OutputError, match="1 tensor names are used twice"):
        job.sink(out, shard_size=1).begin([Key("a", (1,), "uint8")] * 2)


def test_a_block_that_does_not_fit_is_refused(job, out):
    sink = job.sink(out)
    sink.begin(job.keys)
    for start, block in [(3, np.zeros((2, 5), "u4")), (0, np.zeros((2, 5), "u2")), (0, np.zeros((2, 4), "u4"))]:
        with pytest.raises(ValueError, match=r"a\.weight: rows"):
            sink.write("a.weight", start, block)
    sink.abort()


def test_short_writes_are_continued(job, out, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, bytes(data)[:7], at))
    job.write(out, shard_size=70)
    monkeypatch.undo()
    job.check(out)


# --- resume ----------------------------------------------------------------------------------------


def test_resume_does_only_what_is_left(job, out, tmp_path, tree):
    job.write(tmp_path / "straight", shard_size=70)
    sink = job.sink(out, shard_size=70)
    done = job.run(sink, 3)
    sink.abort()
    assert not out.exists()
    sink = job.sink(out, shard_size=70, resume=True)
    sink.begin(job.keys)
    assert sink.completed() == done
    sink.abort()
    job.write(out, shard_size=70, resume=True)
    assert tree(out) == tree(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "straight"]


def test_killed_run_is_resumed_with_all_it_had_finished(job, out):
    script = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from conftest import Job\n"
        "job = Job(); job.run(job.sink(Path(sys.argv[1])), 4); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", script, out, Path(__file__).parent], check=False)
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(OutputError, match=r"a previous run was interrupted; pass --resume .* or --overwrite"):
        job.write(out)
    sink = job.sink(out, resume=True)
    sink.begin(job.keys)
    assert list(sink.completed()) == [key.name for key in job.keys[:4]]
    sink.abort()
    job.write(out, resume=True)
    job.check(out)


def test_resume_with_nothing_to_resume_starts_anew(job, out):
    job.write(out, resume=True)
    job.check(out)


def test_overwrite_drops_an_interrupted_run(job, out):
    sink = job.sink(out)
    job.run(sink, 3)
    sink.abort()
    sink = job.sink(out, overwrite=True)
    sink.begin(job.keys)
    assert not sink.completed()
    sink.abort()


def test_a_run_that_finished_nothing_leaves_nothing(job, out):
    sink = job.sink(out)
    job.run(sink, 0)
    assert (out.parent / "merged.partial").exists()
    sink.abort()
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"recipe": {"method": "ties", "seed": 0}}, r"recipe \(method\) changed"),
        ({"recipe": {"seed": 0, "method": "linear"}}, r"recipe \(order\) changed"),
        ({"inputs": {"math": {"size": 4}}}, "input 'math' changed"),
        ({"inputs": {"math": {"size": 3}, "code": {}}}, "input 'code' changed"),
        ({"version": "0.2.0"}, r"version \(0\.1\.0 -> 0\.2\.0\) changed"),
        ({"version": "9", "inputs": {}}, r"input 'math', version .* changed"),
    ],
)
def test_resume_refuses_another_identity_and_says_which_part(job, out, change, text):
    sink = job.sink(out)
    job.run(sink, 3)
    sink.abort()
    with pytest.raises(OutputError, match=text + "; pass --overwrite to start anew"):
        job.sink(out, resume=True, identity={**job.identity, **change}).begin(job.keys)
    assert (out.parent / "merged.partial").exists()
    sink = job.sink(out, resume=True)
    sink.begin(job.keys)
    assert len(sink.completed()) == 3
    sink.abort()


def test_resume_refuses_another_layout(job, out):
    sink = job.sink(out)
    job.run(sink, 3)
    sink.abort()
    with pytest.raises(OutputError, match=r"layout of the output \(tensors, dtypes or shard_size\) changed"):
        job.sink(out, resume=True, shard_size=70).begin(job.keys)


@pytest.mark.parametrize("damage", ["cut", "header", "gone"])
def test_resume_refuses_damaged_files(job, out, damage):
    sink = job.sink(out)
    job.run(sink, 3)
    sink.abort()
    shard = out.parent / "merged.partial/files/model.safetensors"
    if damage == "cut":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "header":
        shard.write_bytes(shard.read_bytes().replace(b"a.mask", b"a.musk"))
    else:
        shard.unlink()
    with pytest.raises(OutputError, match=r"model\.safetensors is missing or was changed; pass --overwrite"):
        job.sink(out, resume=True).begin(job.keys)


def test_a_failed_finish_can_be_resumed_and_leaves_no_half_written_file(job, out):
    def fail(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub/half.json").write_text("{")
        raise OutputError("disk full")

    sink = job.sink(out)
    job.run(sink)
    with pytest.raises(OutputError, match="disk full"), sink.finishing() as folder:
        fail(folder)
    sink.abort()
    assert not out.exists()
    sink = job.sink(out, resume=True)
    job.run(sink, 0)
    assert len(sink.completed()) == len(job.keys)
    with sink.finishing():
        pass
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


# --- an output that is there already ---------------------------------------------------------------


def test_a_folder_with_something_in_it_is_not_touched(job, out, tree):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty; choose another folder or pass --overwrite"):
        job.sink(out).begin(job.keys)
    assert tree(out.parent) == {"merged/notes.txt": b"mine"}


def test_an_empty_folder_and_missing_parents_are_fine(job, tmp_path):
    (tmp_path / "empty").mkdir()
    job.write(tmp_path / "empty")
    job.write(tmp_path / "deep/er/out")
    job.check(tmp_path / "empty")
    job.check(tmp_path / "deep/er/out")


def test_a_file_is_refused(job, out):
    out.write_text("a file")
    with pytest.raises(OutputError, match="is a file; choose another name"):
        job.sink(out, overwrite=True).begin(job.keys)
    assert out.read_text() == "a file"


def test_overwrite_replaces_the_whole_folder_at_the_end(job, out):
    job.write(out, shard_size=70)
    (out / "stale.json").write_text("{}")
    old = sorted(path.name for path in out.iterdir())
    sink = job.sink(out, overwrite=True)
    job.run(sink)
    assert sorted(path.name for path in out.iterdir()) == old
    with sink.finishing():
        pass
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    job.check(out)


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_crash_while_replacing_loses_neither_old_nor_new(job, out, tree, monkeypatch, moment):
    """Die right before the old folder is moved, between the two renames, or before the old one is deleted."""
    out.mkdir()
    (out / "old.txt").write_text("old")
    rename, calls = Path.rename, []

    class Killed(BaseException):
        pass

    def dying(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) > {"before": 0, "between": 1, "after": 2}[moment]:
            raise Killed
        return rename(path, target)

    sink = job.sink(out, overwrite=True)
    job.run(sink)
    monkeypatch.setattr(Path, "rename", dying)
    if moment == "after":
        monkeypatch.setattr(output, "remove", lambda path: dying(path, path))
    with pytest.raises(Killed), sink.finishing():
        pass
    monkeypatch.undo()
    sink._lock.release()  # as the kernel does
    held = tree(out.parent)
    assert "old" in [text.decode() for name, text in held.items() if name.endswith("old.txt")]
    assert any(name.endswith("model.safetensors") for name in held)

    # The next run restores a state with one OUT before anything else, and then obeys its own options.
    if moment == "after":
        with pytest.raises(OutputError, match="exists and is not empty"):
            job.sink(out).begin(job.keys)
        assert list(tree(out.parent)) == ["merged/model.safetensors"]
    else:
        with pytest.raises(OutputError, match="exists and is not empty"):
            job.sink(out, resume=True).begin(job.keys)
        assert tree(out) == {"old.txt": b"old"}
        sink = job.sink(out, resume=True, overwrite=True)
        job.run(sink, 0)
        assert len(sink.completed()) == len(job.keys)
        with sink.finishing():
            pass
    job.check(out)
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


def test_an_output_filled_during_the_run_is_kept(job, out):
    sink = job.sink(out)
    job.run(sink)
    out.mkdir()
    (out / "other.txt").write_text("other")
    with (
        pytest.raises(OutputError, match="was filled by somebody else during the run; move it away, then"),
        sink.finishing(),
    ):
        pass
    sink.abort()
    assert (out / "other.txt").read_text() == "other"
    out.rename(out.parent / "elsewhere")
    job.write(out, resume=True)
    job.check(out)


def test_a_foreign_partial_folder_is_never_removed(job, out):
    foreign = out.parent / "merged.partial"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    (out.parent / "other.partial").write_text("mine")
    with pytest.raises(OutputError, match="is in the way and was not made by weightsmith"):
        job.sink(out.parent / "other", overwrite=True).begin(job.keys)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="is in the way and was not made by weightsmith"):
            job.sink(out, **options).begin(job.keys)
    assert (foreign / "thesis.tex").read_text() == "mine"


def test_everything_is_on_the_disk_before_it_becomes_visible(job, out, monkeypatch):
    synced, rename = set(), Path.rename

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)

    def checked(path: Path, target: Path) -> Path:
        assert {item.stat().st_ino for item in [path, *path.rglob("*")]} <= synced
        synced.clear()
        return rename(path, target)

    sink = job.sink(out, shard_size=70)
    job.run(sink)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", checked)
    with sink.finishing() as folder:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text("{}")
    assert synced == {out.parent.stat().st_ino}  # and then the new name itself
    assert len(list(out.rglob("*"))) > 4


# --- errors of the disk ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device; free some space, then run again, with --resume"),
        (errno.EIO, "Input/output error; check the disk"),
        (errno.EFBIG, "File too large; .* choose a smaller output.shard_size"),
    ],
)
def test_a_failing_write_names_path_and_remedy_and_can_be_resumed(job, out, monkeypatch, number, advice):
    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    sink = job.sink(out)
    job.run(sink, 2)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=rf"cannot write .*files/model\.safetensors: {advice}"):
        job.record(sink, job.keys[2])
    monkeypatch.undo()
    sink.abort()
    job.write(out, resume=True)
    job.check(out)


def test_a_disk_that_cannot_hold_the_output_fails_before_the_work(job, out):
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from pathlib import Path; from conftest import Job, Key\n"
        "job = Job([Key('w', (100, 100), 'float32')]); job.sink(Path(sys.argv[1])).begin(job.keys)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, out, Path(__file__).parent], check=False, capture_output=True, text=True
    )
    assert ended.stderr.rstrip().endswith(
        "File too large; no file may be this large here; choose a smaller output.shard_size"
    )
    assert not list(out.parent.iterdir())


# --- check_output ----------------------------------------------------------------------------------


def check(out: Path, *inputs: Path, overwrite: bool = False, resume: bool = False, needed: int = 0) -> list[str]:
    before = sorted(out.parent.rglob("*")) if out.parent.exists() else None
    problems = check_output(out, inputs, overwrite, resume, needed)
    assert before == (sorted(out.parent.rglob("*")) if out.parent.exists() else None)  # creates nothing
    return texts(problems)


def test_check_output_finds_nothing_wrong(tmp_path):
    (tmp_path / "base").mkdir()
    assert check(tmp_path / "out", tmp_path / "base", needed=1000) == []
    assert check(tmp_path / "a/b/out", tmp_path / "base", needed=1000) == []


def test_check_output_compares_with_the_inputs(tmp_path):
    base = tmp_path / "models/base"
    base.mkdir(parents=True)
    (base / "model.safetensors").touch()
    (tmp_path / "link").symlink_to(base)
    remedy = "choose another output folder"
    assert f"{base} is also an input; {remedy}" in check(base, base, overwrite=True)
    assert f"{base} is also an input; {remedy}" in check(tmp_path / "link", base, overwrite=True)
    assert check(base / "out", base) == [f"{base / 'out'} lies inside the input {base}; {remedy}"]
    assert check(base.parent, base / "model.safetensors", overwrite=True) == [
        f"{base.parent} holds the input {base / 'model.safetensors'}; {remedy}"
    ]
    assert check(base.parent / "base2", base) == []


def test_check_output_reports_all_problems_at_once(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").touch()
    (tmp_path / "out.partial/files").mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_100_000_000))
    problems = check(out, out, needed=14_200_000_000)
    assert [text.split(str(out))[1][:30] for text in problems] == [
        " is also an input; choose anot",
        " exists and is not empty; choo",
        ".partial: a previous run was i",
        " needs 14.20 GB, but 3.10 GB a",
    ]
    assert check(out, needed=1, overwrite=True) == []


def test_check_output_counts_the_space_of_the_interrupted_run(job, out, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    needed = 4096
    assert "needs 0.00 GB" in check(out, needed=needed)[0]
    monkeypatch.undo()
    sink = job.sink(out)
    job.run(sink, 1)
    sink.abort()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert check(out, needed=needed, resume=True) == []


def test_check_output_on_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert "is a file, so" in check(tmp_path / "file/out")[0]
    assert "is a mount point" in check_output(Path("/proc"), (), True, False, 0)[0].text
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert check(tmp_path / "a/out") == [f"{tmp_path} is not writable; choose another folder"]


def test_check_output_names_the_run_that_holds_the_folder(job, out):
    sink = job.sink(out)
    job.run(sink, 1)
    (problem,) = check(out)
    assert f"is in use by process {os.getpid()} on host" in problem
    sink.abort()


def test_a_shard_without_room_is_left_closable(tmp_path, monkeypatch):
    """Whoever asked for it closes what `opened` holds, whatever failed."""
    from weightsmith.core.keys import Key
    from weightsmith.io.write import writer
    from weightsmith.io.write.layout import plan_shards

    def full(descriptor, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "allocate", full)
    (shard,) = plan_shards((Key("w", (4,), "float32"),), 10**6, "model", {})
    opened = {}
    with pytest.raises(OutputError, match="No space left"):
        writer.lay_out(tmp_path, shard, opened)
    os.close(opened[shard.name])
