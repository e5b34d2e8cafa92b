"""Shards of torch.distributed.checkpoint: put together by their offsets; one of them is no model."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightsmith as ws
from weightsmith.core.errors import SourceError
from weightsmith.io.read.open import open_source

W = torch.arange(70.0).reshape(7, 10)
Part = tuple[torch.Tensor, list[int]]


def shard(folder: Path, rank: int, parts: Mapping[str, Part]) -> Path:
    """One process's file, as torch 2.13.0's HuggingFaceStorageWriter(save_distributed=True) writes it."""
    folder.mkdir(exist_ok=True)
    notes = {name: {"saved_offsets": offsets} for name, (_, offsets) in parts.items()}
    path = folder / f"shard-{rank:05}-model-00001-of-00001.safetensors"
    tensors = {name: value.contiguous() for name, (value, _) in parts.items()}
    save_file(tensors, path, {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(notes)})
    return path


def checkpoint(folder: Path, add: float = 0.0) -> Path:
    """Rows of w on two of three processes, an empty part on the last; columns of v; the norm and a scalar on one."""
    v, w = W.T.bfloat16() + add, W + add
    shard(folder, 1, {"w": (w[:4], [0, 0]), "v": (v[:5, :3], [0, 0])})
    norm: dict[str, Part] = {"norm": (torch.ones(3) + add, [0]), "scale": (torch.tensor(2.5 + add), [])}
    shard(folder, 2, {"w": (w[4:], [4, 0]), "v": (v[:5, 3:], [0, 3]), **norm})
    shard(folder, 3, {"w": (w[:0], [7, 0]), "v": (v[5:], [5, 0])})
    return folder


def test_offsets_put_the_tensors_together(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(open_source(checkpoint(tmp_path / "m"))))
    assert {name: key.shape for name, key in source.keys.items()} == {
        "w": (7, 10), "v": (10, 7), "norm": (3,), "scale": ()
    }  # fmt: skip
    assert torch.equal(source.read("w"), W)
    assert torch.equal(source.read("v"), W.T.bfloat16())
    assert source.read("scale").item() == 2.5
    for start, stop in ((0, 1), (3, 5), (5, 7), (2, 2), (6, 7)):
        assert torch.equal(source.read("w", start, stop), W[start:stop])
        assert torch.equal(source.read("v", start, stop), W.T.bfloat16()[start:stop])
    assert len(source.fingerprint()["files"]) == 3


def test_a_merge_of_folders_of_shards(tmp_path: Path) -> None:
    ws.merge({"a": checkpoint(tmp_path / "a"), "b": checkpoint(tmp_path / "b", 1.0)}, "average", out=tmp_path / "out")
    made = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(made["w"], W + 0.5)
    assert made["scale"].item() == 3.0


def test_one_shard_is_no_model(tmp_path: Path) -> None:
    checkpoint(tmp_path / "m")
    for rank in (1, 2):
        with pytest.raises(
            SourceError, match=r"one shard of a distributed checkpoint, with parts of .*; give the folder"
        ):
            open_source(tmp_path / f"m/shard-{rank:05}-model-00001-of-00001.safetensors")
    alone = shard(tmp_path / "alone", 1, {"w": (W, [0, 0])})
    assert torch.equal(open_source(alone).read("w"), W)
    assert torch.equal(open_source(alone.parent).read("w"), W)


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ({"w": (W[5:], [5, 0])}, r"'w': 60 of 70 entries are there \(shard-00001.*\); a shard is missing"),
        ({"w": (W[3:], [3, 0])}, r"'w': its parts in shard-00001.* and shard-00002.* overlap"),
        ({"w": (W[4:].half(), [4, 0])}, r"'w' is float32 in one shard, float16 in shard-00002"),
        ({"w": (W[4:], [4])}, r"DCP_SHARDING_INFO says nothing sensible about 'w'"),
        ({"w": (W[4:, 0], [4])}, r"the parts of 'w' have unlike numbers of axes"),
    ],
)
def test_shards_that_do_not_make_a_whole(second: Mapping[str, Part], problem: str, tmp_path: Path) -> None:
    shard(tmp_path / "m", 1, {"w": (W[:4], [0, 0])})
    shard(tmp_path / "m", 2, second)
    with pytest.raises(SourceError, match=problem):
        open_source(tmp_path / "m")


def test_a_process_whose_shard_is_missing(tmp_path: Path) -> None:
    shard(tmp_path / "m", 1, {"w": (W[:4], [0, 0])})
    shard(tmp_path / "m", 3, {"w": (W[4:], [4, 0])})
    with pytest.raises(SourceError, match="the shards of process 2 of 3 are missing"):
        open_source(tmp_path / "m")


def test_what_consolidation_lost_is_said(tmp_path: Path) -> None:
    """torch 2.13.0 writes 0.0 for every tensor without axes when it puts shards together."""
    folder = tmp_path / "m"
    folder.mkdir()
    checkpoint(folder / "sharded")
    whole = {"w": W, "v": W.T.bfloat16().contiguous(), "norm": torch.ones(3), "scale": torch.tensor(0.0)}
    save_file(whole, folder / "model.safetensors")
    (remark,) = open_source(folder).origin.remarks
    assert remark.startswith("scale: another value than in sharded/, from which torch put the file together")
    save_file({**whole, "scale": torch.tensor(2.5)}, folder / "model.safetensors")
    assert not open_source(folder).origin.remarks
