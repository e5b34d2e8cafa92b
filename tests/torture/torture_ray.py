"""Merges on a Ray cluster of several nodes (processes of this machine): the same bytes, whatever dies."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import save_file

from matrix import CODECS, LAYOUTS, NAMES, check, merged
from remote.conftest import Web
from weightsmith.core.errors import NumericError, OutputError, WeightsmithError
from weightsmith.engine.cluster import ray_runner
from weightsmith.io import system
from weightsmith.io.read.source import Source
from weightsmith.io.write.writer import ShardWriter
from weightsmith.jobs.merge import run
from weightsmith.jobs.sweep import run_sweep
from weightsmith.recipe.load import loads
from weightsmith.recipe.schema import Output, Recipe

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own
TENSORS = 12
STORE = Path(tempfile.mkdtemp(prefix="weightsmith-store-"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that does no work, and two nodes of one processor.  `dir://x` is STORE/x for every process."""
    os.environ["FSSPEC_DIR"] = json.dumps({"path": str(STORE), "target_protocol": "file"})
    fsspec.config.set_conf_env(fsspec.config.conf)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1, memory=4 << 30)
    ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # for Slow: workers cannot import this file
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()
    del os.environ["FSSPEC_DIR"]
    del fsspec.config.conf["dir"]
    shutil.rmtree(STORE, ignore_errors=True)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    torch.manual_seed(0)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        made = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(40, 30).bfloat16() for i in range(TENSORS)}
        save_file(made, tmp_path / name / "model.safetensors")
    text = "base: ./base\nmodels: {a: ./a, b: ./b}\nmethod: ties\nrules: [{layers: [0, 3], method: tsvm}]"
    return loads(text, folder=tmp_path)


def bits(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


class Slow(ShardWriter):
    """Says who writes, and takes its time."""

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        log = self.folder.parent.parent / "log"
        log.mkdir(exist_ok=True)
        (log / f"{ray.get_runtime_context().get_node_id()}-{os.getpid()}-{name}").touch()
        time.sleep(0.3)
        super().write(name, start, bits)


def test_the_same_bytes_as_on_one_machine(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """With a model-wide measuring pass, and on another path for some of the tensors."""
    seen: list[tuple[int, int]] = []
    run(recipe, tmp_path / "far", ray=cluster.address, progress=lambda done, total: seen.append((done, total)))
    assert bits(tmp_path / "far") == bits(run(recipe, tmp_path / "near", threads=1).out)
    assert seen[-1][0] == seen[-1][1] > 0
    variants = {f"seed={i}": recipe.model_copy(update={"seed": i}) for i in range(2)}
    run_sweep(variants, tmp_path / "swept", ray=cluster.address)
    assert bits(tmp_path / "swept" / "seed=1") == bits(tmp_path / "near")


def test_every_method_on_the_cluster(
    cluster: Cluster, memory: dict[str, Source], layouts: dict[str, dict[str, Source]], tmp_path: Path
) -> None:
    """Every registered method and codec, tasks spread over the nodes; inputs and shards in turns of the layouts."""
    with ray_runner(cluster.address, cpus=1, memory=1 << 28) as runner:
        assert runner is not None
        for turn, name in enumerate(NAMES + CODECS):
            layout = layouts[LAYOUTS[turn % len(LAYOUTS)].__name__]
            size = (1, 5000, 10**9)[turn % 3]
            assert check(name, layout, size, runner, tmp_path / name) == merged(name, memory), name


class Full(ShardWriter):
    """A disk that takes nothing any more."""

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        def call(function: Any, /, *args: Any, **kwargs: Any) -> Any:
            if function is os.pwrite:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        usual, system.call = system.call, call
        try:
            super().write(name, start, bits)
        finally:
            system.call = usual


def test_a_disk_that_is_full_on_a_node(
    cluster: Cluster, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes back as it is, and the run goes on when there is room."""
    near = bits(run(recipe, tmp_path / "near", threads=1).out)
    with monkeypatch.context() as patch:
        patch.setattr("weightsmith.io.write.output.ShardWriter", Full)
        with pytest.raises(OutputError, match=r"cannot write .*model.safetensors: No space left on device; free some"):
            run(recipe, tmp_path / "far", ray=cluster.address)
    assert not (tmp_path / "far").exists()
    assert bits(run(recipe, tmp_path / "far", ray=cluster.address, resume=True).out) == near


def test_workers_read_and_write_urls(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    """Inputs on a web server; the output in a store that all processes see (fsspec's `dir`, see `cluster`)."""
    near = run(recipe.model_copy(update={"output": Output(shard_size=5000)}), tmp_path / "near", threads=1).out
    assert isinstance(near, Path)
    server = Web()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        for name in ("base", "a", "b"):
            server.files[f"/{name}/model.safetensors"] = (tmp_path / name / "model.safetensors").read_bytes()
        text = "base: {0}/base\nmodels: {{a: {0}/a, b: {0}/b}}\nmethod: ties\noutput: {{shard_size: 5000}}\n"
        far = loads(text.format(server.address) + "rules: [{layers: [0, 3], method: tsvm}]")
        run(far, tmp_path / "far", ray=cluster.address)
        run(far, Path("dir://store/out"), ray=cluster.address)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    shards = sorted(path.name for path in near.glob("*.safetensors"))
    assert len(shards) > 3
    for folder in (tmp_path / "far", STORE / "store" / "out"):
        assert [(folder / name).read_bytes() for name in shards] == [(near / name).read_bytes() for name in shards]


def test_a_node_that_dies_costs_time_only(
    cluster: Cluster, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = bits(run(recipe, tmp_path / "near", threads=1).out)
    doomed = cluster.add_node(num_cpus=1, memory=4 << 30)
    cluster.wait_for_nodes()
    monkeypatch.setattr("weightsmith.io.write.output.ShardWriter", Slow)
    lost: list[str] = []

    def kill(done: int, total: int) -> None:
        writing = {path.name.split("-")[0] for path in (tmp_path / "log").glob("*")}
        if doomed.node_id in writing and not lost:
            lost.append(doomed.node_id)
            cluster.remove_node(doomed, allow_graceful=False)

    out = run(recipe, tmp_path / "far", ray=cluster.address, progress=kill).out
    assert lost, "the node never worked"
    assert bits(out) == near


def test_a_driver_that_stops_goes_on_from_its_journal(
    cluster: Cluster, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = bits(run(recipe, tmp_path / "near", threads=1).out)
    monkeypatch.setattr("weightsmith.io.write.output.ShardWriter", Slow)

    def stop(done: int, total: int) -> None:
        if len(list((tmp_path / "log").glob("*"))) > TENSORS // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "far", ray=cluster.address, progress=stop)
    journalled = (tmp_path / "far.partial" / "journal.jsonl").read_text().count('"task":')
    assert 0 < journalled < TENSORS
    for path in (tmp_path / "log").glob("*"):
        path.unlink()
    out = run(recipe, tmp_path / "far", ray=cluster.address, resume=True).out
    assert bits(out) == near
    assert len(list((tmp_path / "log").glob("*"))) == TENSORS - journalled


def test_errors_come_back_as_they_are(cluster: Cluster, recipe: Recipe, tmp_path: Path) -> None:
    broken = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((40, 30), float("nan")) for i in range(TENSORS)}
    save_file(broken, tmp_path / "b" / "model.safetensors")
    with pytest.raises(NumericError, match=r"model.layers.\d+.mlp.up_proj.weight in b holds NaN at \[0, 0\]"):
        run(recipe, tmp_path / "far", ray=cluster.address)
    assert not (tmp_path / "far.partial").exists()


def test_nodes_that_are_too_small_are_named(
    cluster: Cluster, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsmith.plan.room.PYTHON", 10**15)
    with pytest.raises(WeightsmithError, match=r"a task needs [\d,]+ MB, the largest node has [\d,]+ MB"):
        run(recipe, tmp_path / "far", ray=cluster.address)
