"""The manifest: equal runs give equal bytes, and verify finds whatever changed since."""

from __future__ import annotations

import json
import platform
import shutil
from importlib import metadata
from pathlib import Path

import pytest

from weightsmith.core.errors import OutputError
from weightsmith.core.keys import Key
from weightsmith.io.package.manifest import (
    MANIFEST,
    build_manifest,
    merge_parts,
    read_manifest,
    verify_folder,
    write_manifest,
)


def make(job, out: Path, **options) -> Path:
    sink = job.sink(out, shard_size=70, **options)
    records = job.run(sink)
    with sink.finishing() as folder:
        (folder / "2_Dense").mkdir()
        files = [folder / "config.json", folder / "2_Dense/model.safetensors"]
        for path in files:
            path.write_text('{"a": 1}')
        manifest = build_manifest(
            folder,
            recipe={"method": ("linear",)},
            inputs={"math": {"size": 3}},
            keys=job.keys,
            records=records.values(),
            made_by={key.name: "linear" if key.floating else "copied" for key in job.keys},
        )
        write_manifest(folder, manifest)
    return out


@pytest.fixture
def made(job, out):
    return make(job, out)


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_sound_folder_has_no_problems(made, job):
    read = []
    assert verify_folder(made, read.append) == []
    assert sum(read) == sum(key.nbytes for key in job.keys)


def test_what_it_says(made, job):
    manifest = read_manifest(made)
    assert manifest["kind"] == "merge"
    assert manifest["recipe"] == {"method": ["linear"]}
    assert manifest["made_by"] == {
        "linear": ["embed.weight", "a.weight", "a.scale", "a.empty", "b.weight", "c.weight"],
        "copied": ["a.mask", "b.steps"],
    }
    found = {name: metadata.version(name) for name in ("torch", "numpy")}
    assert manifest["versions"] == {**found, "python": platform.python_version()}
    assert "created" not in manifest
    tensor = manifest["output"]["tensors"]["b.weight"]
    assert (tensor["dtype"], tensor["shape"]) == ("bfloat16", [5, 7])
    assert [part[:2] for part in tensor["parts"]] == [[0, 2], [2, 4], [4, 5]]
    assert manifest["output"]["files"]["config.json"]["bytes"] == 8


def test_two_equal_runs_give_equal_bytes(made, job, tmp_path, tree):
    assert tree(make(job, tmp_path / "elsewhere/again")) == tree(made)
    sink = job.sink(tmp_path / "resumed", shard_size=70)
    job.run(sink, 4)
    sink.abort()
    assert tree(make(job, tmp_path / "resumed", resume=True)) == tree(made)


def test_a_time_is_noted_only_if_asked_for(job, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert read_manifest(make(job, tmp_path / "out"))["created"] == "1970-01-02T00:00:00+00:00"


def test_any_flipped_bit_of_a_tensor_is_found_and_named(made, job):
    from safetensors import safe_open

    for path in sorted(made.glob("model-*.safetensors")):
        with safe_open(path, "np") as file:
            names = file.offset_keys()
        data = path.read_bytes()
        start = at = 8 + int.from_bytes(data[:8], "little")
        for name in names:
            key = next(key for key in job.keys if key.name == name)
            for byte in range(at, at + key.nbytes):
                flip(path, byte, byte % 8)
                row = (byte - at) // max(1, key.nbytes // key.rows)
                first = row - row % 2
                last = min(first + 2, key.rows)
                assert verify_folder(made) == [f"{path.name}: tensor {name}, rows {first} to {last}, was altered"]
                flip(path, byte, byte % 8)
            at += key.nbytes
        assert at == len(data) > start or not any(key.nbytes for key in job.keys if key.name in names)


def test_any_flipped_bit_of_a_header_is_found(made):
    path = sorted(made.glob("model-*.safetensors"))[0]
    for at in range(8 + int.from_bytes(path.read_bytes()[:8], "little")):
        flip(path, at, at % 8)
        assert verify_folder(made) == [f"{path.name} was altered in its header"]
        flip(path, at, at % 8)


@pytest.mark.parametrize("name", ["config.json", "2_Dense/model.safetensors", "model.safetensors.index.json"])
def test_altered_companions_are_found(made, name):
    flip(made / name, 2)
    assert verify_folder(made) == [f"{name} was altered"]


def test_missing_extra_and_cut_files_are_found(made):
    shards = sorted(path.name for path in made.glob("model-*.safetensors"))
    (made / "config.json").unlink()
    (made / shards[0]).unlink()
    (made / "extra.bin").touch()
    (made / ".git").mkdir()
    (made / ".git/config").touch()
    size = (made / shards[1]).stat().st_size
    (made / shards[1]).write_bytes((made / shards[1]).read_bytes()[:-1])
    assert sorted(verify_folder(made)) == sorted(
        [
            "config.json is missing",
            f"{shards[0]} is missing",
            "extra.bin was not there when the folder was written",
            f"{shards[1]} has {size - 1} bytes instead of {size}",
        ]
    )


def test_a_manifest_that_was_edited_is_refused(made):
    text = (made / MANIFEST).read_text()
    other_layout = json.dumps(json.loads(text))
    for changed in (text.replace('"math"', '"meth"'), text[:-3], "[]", "null", '{"xxh3_128": 3}', "", other_layout):
        (made / MANIFEST).write_text(changed)
        with pytest.raises(OutputError, match=r"weightsmith\.json is damaged or was edited"):
            verify_folder(made)
    (made / MANIFEST).write_text(text)
    assert verify_folder(made) == []


def test_a_folder_without_a_manifest_is_refused(made, tmp_path):
    (made / MANIFEST).unlink()
    with pytest.raises(OutputError, match=r"cannot read .*: No such file .* was this folder made by weightsmith\?"):
        verify_folder(made)
    shutil.rmtree(made)
    with pytest.raises(OutputError, match="cannot read"):
        verify_folder(made)


def test_parts_must_make_up_every_tensor():
    keys = [Key("w", (5, 2), "float32"), Key("s", (), "float32"), Key("e", (0, 2), "float32")]
    scalar = ["s", 0, 1, "c"]

    def parts(*found):
        return merge_parts([{"parts": [["w", *span, "x"]]} for span in found] + [{"parts": [scalar]}], keys)

    assert parts((2, 5), (0, 2)) == {"w": [(0, 2, "x"), (2, 5, "x")], "s": [(0, 1, "c")], "e": []}
    for wrong in [(), ((0, 2),), ((0, 2), (3, 5)), ((0, 3), (2, 5)), ((0, 5), (0, 5)), ((0, 6),)]:
        with pytest.raises(OutputError, match=r"^w: the parts written, .*, do not make up its 5 rows; run it again"):
            parts(*wrong)
