"""Model folders: which file is the model, index safety, links, shards that do not match their index."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightsmith.core.errors import SourceError
from weightsmith.io.read.folder import FolderSource
from weightsmith.io.read.open import open_source

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2), "b": torch.zeros(3, 2)}, folder / ONE)
    save_file({"c": torch.full((4,), 5.0)}, folder / TWO)
    write_index(folder, {"a": ONE, "b": ONE, "c": TWO})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "something.safetensors", "pytorch_model.bin"]
)
def test_a_single_file(tmp_path: Path, name: str) -> None:
    tensors = {"w": torch.arange(6.0).reshape(3, 2)}
    torch.save(tensors, tmp_path / name) if name.endswith(".bin") else save_file(tensors, tmp_path / name)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not looked at")
    source = FolderSource(tmp_path)
    assert source.read("w", 1, 3).equal(tensors["w"][1:3])
    assert source.origin.folder == tmp_path
    assert list(source.fingerprint()["files"]) == [name]


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "weights.safetensors")
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert FolderSource(tmp_path).read("w").item() == 1


def test_shards(sharded: Path) -> None:
    for source in (FolderSource(sharded), FolderSource(sharded / INDEX)):
        assert list(source.keys) == ["a", "b", "c"]
        assert source.read("c").tolist() == [5.0] * 4
        assert source.bits("b", 1).shape == (2, 2)
        assert source.origin.folder == sharded
        assert set(source.fingerprint()["files"]) == {ONE, TWO}
        assert pickle.loads(pickle.dumps(source)).read("a").tolist() == [1, 1]


def test_pickled_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "epoch": 3}, tmp_path / "pytorch_model-1.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-2.bin")
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = FolderSource(tmp_path)
    assert set(source.keys) == {"a", "b"}
    assert source.origin.remarks == ("entries that are no tensors are left out: epoch",)


def refuse(folder: Path, text: str) -> None:
    with pytest.raises(SourceError, match=text) as error:
        FolderSource(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_no_model_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refuse(
        tmp_path, r"no model here; looked for model\.safetensors, model\.safetensors\.index\.json, .*pytorch_model\.bin"
    )
    refuse(tmp_path / "absent", "cannot be listed")


def test_two_that_could_be_meant(sharded: Path, tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, sharded / "model.safetensors")
    refuse(sharded, r"has both model\.safetensors and model\.safetensors\.index\.json")
    assert set(FolderSource(sharded / INDEX).keys) == {"a", "b", "c"}
    for name in ("x", "y"):
        save_file({"w": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    refuse(tmp_path, r"2 safetensors files and no index \(x\.safetensors, y\.safetensors\)")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "C:x", "x\0y", 5, None, ["x"]]
)
def test_an_index_that_points_elsewhere(sharded: Path, name: Any) -> None:
    write_index(sharded, {"a": ONE, "b": ONE, "c": name})
    refuse(sharded, "'c' points to .*, which is not a file name inside the folder")


def test_missing_shards_are_named(sharded: Path) -> None:
    (sharded / TWO).unlink()
    refuse(sharded, f"1 of 2 shards are missing: {TWO}")


def test_an_index_that_lies(sharded: Path) -> None:
    write_index(sharded, {"a": ONE, "b": ONE, "c": TWO, "d": TWO})
    refuse(sharded, f"'d' should be in {TWO}, but that shard does not hold it")
    write_index(sharded, {"a": ONE, "b": TWO, "c": TWO})
    refuse(sharded, f"'b' should be in {TWO}")
    write_index(sharded, {"a": ONE, "c": TWO})
    refuse(sharded, f"does not name b, which {ONE} holds")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"c": torch.zeros(4), "a": torch.zeros(2)}, sharded / TWO)
    refuse(sharded, f"'a' is stored twice, in {ONE} and {TWO}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a shard index"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "names 'a' twice"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_an_index_that_is_none(sharded: Path, text: str, problem: str) -> None:
    (sharded / INDEX).write_text(text)
    refuse(sharded, problem)


def test_links_that_leave_the_folder(sharded: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (sharded / TWO).rename(outside)
    (sharded / TWO).symlink_to(outside)
    refuse(sharded, f"{TWO}: a link that leaves the folder")
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "model.safetensors").symlink_to(outside)
    refuse(lone, "a link that leaves the folder")
    (lone / "model.safetensors").unlink()
    (lone / "model.safetensors").symlink_to(lone / "model.safetensors")
    refuse(lone, "cannot be (resolved|read)")


def test_links_inside_and_of_the_folder_itself(sharded: Path, tmp_path: Path) -> None:
    (sharded / TWO).rename(sharded / "kept.safetensors")
    (sharded / TWO).symlink_to("kept.safetensors")
    (tmp_path / "alias").symlink_to(sharded)
    assert FolderSource(tmp_path / "alias").read("c").tolist() == [5.0] * 4


def test_a_hub_cache(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    save_file({"w": torch.ones(1)}, repo / "blobs" / "deadbeef")
    (snapshot / "model.safetensors").symlink_to("../../blobs/deadbeef")
    assert FolderSource(snapshot).read("w").item() == 1
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    save_file({"w": torch.ones(1)}, other / "beef")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "beef")
    refuse(snapshot, "a link that leaves the folder")


def test_an_index_beside_the_one_file_that_it_names(tmp_path: Path) -> None:
    """As every folder of mlx-lm has it."""
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    write_index(tmp_path, {"w": "model.safetensors"})
    source = FolderSource(tmp_path)
    assert source.read("w").tolist() == [1, 1]
    assert source.origin.files == ("model.safetensors",)


def test_one_shard_given_as_a_file_is_said_to_be_one(sharded: Path) -> None:
    source = open_source(sharded / ONE)
    assert set(source.keys) < set(FolderSource(sharded).keys)
    assert source.origin.remarks == (f"{ONE}: one of 2 shards, read alone; give the folder for the whole model",)
    (sharded / ONE).rename(sharded / "model-00001-of-00001.safetensors")
    assert open_source(sharded / "model-00001-of-00001.safetensors").origin.remarks == ()


def test_a_shard_that_supersedes_tensors_of_others(sharded: Path) -> None:
    """transformers 5.24 reads the shards in the order of their names, one over the other."""
    over = "model-overlay-00001.safetensors"
    save_file({"b": torch.ones(3, 2, dtype=torch.float16), "c": torch.zeros(4)}, sharded / over)
    write_index(sharded, {"a": ONE, "b": over, "c": over})
    source = FolderSource(sharded)
    assert source.key("b").dtype == "float16"
    assert source.read("b").tolist() == [[1, 1]] * 3
    assert source.read("a").tolist() == [1, 1]
    assert source.origin.remarks == (f"b: taken from {over}, not from {ONE}, as the index says",)
    write_index(sharded, {"a": ONE, "b": ONE, "c": over})
    refuse(sharded, f"'b' is stored twice, in {ONE} and {over}")
    (sharded / over).rename(sharded / "amendment.safetensors")  # which transformers would read first
    write_index(sharded, {"a": ONE, "b": "amendment.safetensors", "c": TWO})
    refuse(sharded, f"'b' is stored twice, in amendment.safetensors and {ONE}")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("__0_0.distcp", r"python -m torch\.distributed\.checkpoint\.format_utils dcp_to_torch .* model\.pt"),
        ("pytorch_model_fsdp_0", r"accelerate merge-weights .*/pytorch_model_fsdp_0 OUT"),
        ("mp_rank_00_model_states.pt", r"checkpoint of DeepSpeed: give .*/mp_rank_00_model_states\.pt, or of ZeRO-3"),
    ],
)
def test_what_trainers_leave_names_the_command_that_helps(name: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    refuse(tmp_path, f"no model here; a .*{advice}")


def test_shards_without_an_index(tmp_path: Path) -> None:
    """All that their names count are there: they are one model.  A stale index is in the way of that."""
    save_file({"a": torch.ones(2)}, tmp_path / ONE)
    save_file({"b": torch.zeros(2)}, tmp_path / TWO)
    source = FolderSource(tmp_path)
    assert set(source.keys) == {"a", "b"}
    assert source.origin.files == (ONE, TWO)
    write_index(tmp_path, {"a": "model-00002-of-00004.safetensors", "b": "model-00004-of-00004.safetensors"})
    refuse(tmp_path, r"2 of 2 shards are missing: .*; the folder holds the 2 shards of another index: remove this one")
    (tmp_path / INDEX).unlink()
    (tmp_path / ONE).rename(tmp_path / "model-00001-of-00003.safetensors")
    refuse(tmp_path, "2 safetensors files and no index")
    (tmp_path / TWO).rename(tmp_path / "model-00002-of-00003.safetensors")
    refuse(tmp_path, "2 of the 3 shards of a model, and no index .*; get the others")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refuse(tmp_path, r"1 of the 3 shards of a model, and no index \(model-00001-of-00003.safetensors\); get the others")
    (tmp_path / "model-00001-of-00003.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    assert FolderSource(tmp_path).origin.files == ("model-00001-of-00001.safetensors",)
