"""Merges by other processes.  Ray itself, with what dies and comes back, is in tests/torture/torture_ray.py."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from weightsmith.core.errors import MissingExtra, OutputError
from weightsmith.core.keys import Key
from weightsmith.io.write.output import FolderSink
from weightsmith.io.write.sink import MemorySink
from weightsmith.jobs.merge import run
from weightsmith.jobs.verify import rerun
from weightsmith.recipe.load import load

NAMES = ("base", "a", "b")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    for name in NAMES:
        (tmp_path / name).mkdir()
        made = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(40, 30).bfloat16() for i in range(4)}
        save_file(made, tmp_path / name / "model.safetensors")
    (tmp_path / "r.yaml").write_text(
        "base: ./base\nmodels: {a: ./a, b: ./b}\nmethod: ties\nrules: [{layers: [0, 2], method: tsvm}]\n"
    )
    return tmp_path


class Elsewhere:
    """A runner that passes everything through pickle, as one in another process must."""

    remote = True

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        sent = pickle.dumps(function)
        for task in tasks:
            yield pickle.loads(pickle.dumps(pickle.loads(sent)(pickle.loads(pickle.dumps(task)))))


def test_the_same_bytes_from_another_process(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(models / "r.yaml")
    near = run(recipe, models / "near", threads=1).out
    monkeypatch.setattr("weightsmith.engine.cluster.ray_runner", lambda *_, **__: nullcontext(Elsewhere()))
    seen: list[tuple[int, int]] = []
    far = run(recipe, models / "far", ray="somewhere", progress=lambda *now: seen.append(now)).out
    assert (far / "model.safetensors").read_bytes() == (near / "model.safetensors").read_bytes()
    assert seen[-1][0] == seen[-1][1] > 0
    assert rerun(far) == []


def test_without_ray_the_error_says_what_to_install(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"--ray needs ray; install it with: pip install 'weightsmith\[ray\]'"):
        run(load(models / "r.yaml"), models / "far", ray="local")


def test_a_writer_puts_rows_where_the_sink_has_laid_them_out(tmp_path: Path) -> None:
    key = Key("w", (4, 3), "bfloat16")
    sink = FolderSink(tmp_path / "out", shard_size=100, identity={"recipe": {}, "inputs": {}, "version": "1"})
    sink.begin([key])
    writer = pickle.loads(pickle.dumps(sink.writer()))
    rows = np.arange(12, dtype=np.uint16).reshape(4, 3)
    for start in (2, 0):
        writer.write("w", start, rows[start : start + 2])
    with pytest.raises(ValueError, match="are no part of"):
        writer.write("w", 3, rows[:2])
    writer.done("w:0", {})
    sink.done("w:0", {"parts": []})
    with sink.finishing():
        pass
    assert (sink.out / "model.safetensors").read_bytes()[-24:] == rows.tobytes()


def test_memory_cannot_be_written_from_elsewhere() -> None:
    with pytest.raises(OutputError, match="MemorySink takes blocks from one process only"):
        MemorySink().writer()
