"""Folders of torch.distributed.checkpoint as models: the same values as torch loads, nothing executed."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import weightsmith as ws
from weightsmith.core.errors import SourceError
from weightsmith.io.read.dcp import METADATA, DcpSource
from weightsmith.io.read.open import open_source


def tensors(add: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "layers.0.w": torch.arange(24.0).reshape(6, 4) + add,
        "b": torch.arange(5).bfloat16() + add,
        "turned": torch.arange(24.0).reshape(4, 6).t() + add,
        "n": torch.tensor(3),
        "scale": torch.tensor(2.5 + add),
        "none": torch.zeros(0, 4),
        "mask": torch.tensor([True, False]),
    }


def saved(folder: Path, state: dict) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process only
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("wrapped", [None, "model", "app"])
def test_values_and_rows(tmp_path: Path, wrapped: str | None) -> None:
    wanted = tensors()
    state = wanted if wrapped is None else {wrapped: {"model": wanted} if wrapped == "app" else wanted}
    if wrapped:
        state |= {"optim": {"state": {"b": {"exp_avg_sq": torch.ones(5)}}, "param_groups": [{"lr": 1.0}]}, "epoch": 3}
    source = pickle.loads(pickle.dumps(open_source(saved(tmp_path / "c", state))))
    assert set(source.keys) == set(wanted)
    for name, tensor in wanted.items():
        assert source.key(name).dtype == str(tensor.dtype).removeprefix("torch.")
        assert torch.equal(source.read(name), tensor)
        for start, stop in ((0, 1), (2, 4), (3, 3)) if tensor.ndim and len(tensor) > 4 else ():
            assert torch.equal(source.read(name, start, stop), tensor[start:stop])
    assert bool(source.origin.remarks) == bool(wrapped)
    assert METADATA in source.fingerprint()["files"]


def test_parts_in_the_files_of_several_processes(tmp_path: Path) -> None:
    """As two processes save them: rows of a tensor, of unequal number, in a file each, beside tensors of one file."""
    whole = torch.arange(20.0).reshape(5, 4)
    state = {"alone": torch.arange(3.0), "w.0": whole[:3], "w.1": whole[3:], "last": torch.arange(4.0)}
    writer = dcp.FileSystemWriter(tmp_path / "c", thread_count=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process only
        dcp.save({"model": state}, storage_writer=writer, no_dist=True)
    metadata = dcp.FileSystemReader(tmp_path / "c").read_metadata()
    parts = [metadata.state_dict_metadata.pop(f"model.w.{i}") for i in range(2)]
    for i, (part, start) in enumerate(zip(parts, (0, 3), strict=True)):
        part.chunks[0].offsets = torch.Size([start, 0])
        (index,) = [one for one in metadata.storage_data if one.fqn == f"model.w.{i}"]
        metadata.storage_data[dataclasses.replace(index, fqn="model.w", offset=torch.Size([start, 0]))] = (
            metadata.storage_data.pop(index)
        )
        metadata.planner_data.pop(f"model.w.{i}")
    parts[0].size, parts[0].chunks = torch.Size([5, 4]), [part.chunks[0] for part in parts]
    metadata.state_dict_metadata["model.w"], metadata.planner_data["model.w"] = parts[0], ("model", "w")
    (tmp_path / "c" / METADATA).write_bytes(pickle.dumps(metadata))
    source = DcpSource(tmp_path / "c")
    assert len({piece.shard for piece in source.checkpoint.tensors["model.w"][2]}) == 2
    assert len(source.checkpoint.files) == 2
    for name, tensor in {"w": whole, "alone": state["alone"], "last": state["last"]}.items():
        assert torch.equal(source.read(name), tensor)
        assert torch.equal(source.read(name, 1, 4), tensor[1:4])


def test_a_merge_of_checkpoints(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        saved(tmp_path / name, {"model": tensors(float(2 * i))})
    ws.merge([tmp_path / "a", tmp_path / "b"], "average", out=tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors(1.0).items():
        assert torch.equal(made[name], tensor)


def every(folder: Path) -> list[torch.Tensor]:
    source = DcpSource(folder)
    return [source.read(name) for name in source.keys]


class Evil:
    def __reduce__(self):
        return eval, ("1 + 1",)


def test_nothing_is_executed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", tensors())
    for value in (Evil(), {"state_dict_metadata": Evil()}):
        (folder / METADATA).write_bytes(pickle.dumps(value))
        with pytest.raises(SourceError, match="asks for code"):
            DcpSource(folder)


@pytest.mark.parametrize("damage", ["cut metadata", "words", "cut data", "outside", "no data"])
def test_damage_is_a_line(tmp_path: Path, damage: str) -> None:
    folder = saved(tmp_path / "c", tensors())
    metadata, data = folder / METADATA, folder / "__0_0.distcp"
    raw = metadata.read_bytes()
    if damage == "cut metadata":
        metadata.write_bytes(raw[: len(raw) // 2])
    elif damage == "words":
        metadata.write_bytes(pickle.dumps({"a": 1}))
    elif damage == "cut data":
        data.write_bytes(data.read_bytes()[:500])
    elif damage == "outside":
        metadata.write_bytes(raw.replace(b"__0_0.distcp", b"../../../bcd"))
    else:
        data.unlink()
    with pytest.raises(SourceError):
        every(folder)
