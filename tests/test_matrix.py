"""The law of the engine: the same bytes whatever way a merge is carried out, for all that is registered.

A new way is one entry in `WAYS`; a new method or codec is tried in all of them because it is registered.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kit import stage_of
from matrix import (
    BARE,
    CODECS,
    LAYOUTS,
    NAMES,
    RUNNERS,
    SIZES,
    check,
    checksum,
    given,
    layouts,
    memory,
    merged,
    planned,
)
from weightsmith.core.method import registered
from weightsmith.engine.carry import carry_out, context_of
from weightsmith.engine.execute import Variant, execute
from weightsmith.engine.model import measure_model
from weightsmith.engine.runner import SerialRunner, ThreadRunner
from weightsmith.io.read.source import Source
from weightsmith.io.write.sink import MemorySink, Sink
from weightsmith.jobs.merge import run
from weightsmith.recipe.schema import ModelRef

__all__ = ["layouts", "memory"]  # fixtures
ALL = NAMES + CODECS
Sources = dict[str, Source]


def test_nothing_that_is_registered_is_left_out() -> None:
    ours = [name for name, cls in registered().items() if cls.__module__.startswith("weightsmith.")]
    assert sorted([*ALL, "keep"]) == sorted(ours)  # keep: what every tensor under `exclude` is


@pytest.fixture(scope="module")
def expected(memory: Sources) -> dict[str, str]:
    """The checksum of each result, made in the plainest way."""
    return {name: merged(name, memory) for name in ALL}


def blocks_of(rows: int) -> Callable[[str, Sources], str]:
    return lambda name, sources: merged(name, sources, block=rows)


def on_threads(count: int) -> Callable[[str, Sources], str]:
    return lambda name, sources: merged(name, sources, threads=count, runner=ThreadRunner(count))


WAYS: dict[str, Callable[[str, Sources], str]] = {
    "rows one by one": blocks_of(1),
    "blocks of 100 entries": blocks_of(100),
    "one block": blocks_of(1 << 30),
    "2 threads": on_threads(2),
    "8 threads": on_threads(8),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALL)
def test_same_bytes(name: str, way: str, memory: Sources, expected: dict[str, str]) -> None:
    assert WAYS[way](name, memory) == expected[name]


UNMEASURED = [name for name in NAMES if not stage_of(name, **BARE.get(name, {})).passes(3)]


@pytest.mark.parametrize("name", UNMEASURED)
def test_same_bytes_with_parts_of_one_row(
    name: str, memory: Sources, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that may be cut are separate tasks, in any order.  (Sums of float64 have their parts fixed.)"""
    monkeypatch.setattr("weightsmith.core.task.PART_BYTES", 200)
    recipe, inputs = given(name, memory)
    plan = planned(name, recipe, inputs)
    sink = MemorySink()
    carry_out(replace(plan, tasks=plan.tasks[::-1]), inputs, sink)
    assert checksum(sink.tensors()) == expected[name]


@pytest.mark.parametrize("name", ALL)
def test_same_bytes_from_files_of_every_layout_into_shards(
    name: str, memory: Sources, layouts: dict[str, Sources], expected: dict[str, str], tmp_path: Path
) -> None:
    """Three runs in which every setting and every layout occurs, each model in a layout of its own."""
    for turn, (size, runner) in enumerate(zip(SIZES, RUNNERS, strict=True)):
        kinds = [LAYOUTS[(2 * turn + i) % len(LAYOUTS)].__name__ for i in range(len(memory))]
        mixed = {model: layouts[kind][model] for model, kind in zip(memory, kinds, strict=True)}
        assert check(name, mixed, size, runner, tmp_path / f"out{turn}") == expected[name], (size, runner, kinds)


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_from_a_recipe_of_folders(
    name: str, memory: Sources, expected: dict[str, str], tmp_path: Path
) -> None:
    """Models and statistics in folders, a whole run, and what the safetensors library reads of the result."""
    recipe, inputs = given(name, memory)
    for who, source in inputs.models:
        (tmp_path / who).mkdir()
        save_file({k: source.read(k) for k in source.keys}, tmp_path / who / "model.safetensors")
        (tmp_path / f"{who}-stats").mkdir()
    for stat, by_model in inputs.stats.items():
        about = {"weightsmith": f'{{"stat": "{stat}", "examples": 3, "rows": 96, "aliases": {{}}}}'}
        for who, source in by_model.items():
            tensors = {k: source.read(k) for k in source.keys}
            save_file(tensors, tmp_path / f"{who}-stats" / f"{stat}.safetensors", about)
    models = {n: ModelRef(model=str(tmp_path / n), stats=(str(tmp_path / f"{n}-stats"),)) for n in inputs.experts}
    on_disk = recipe.model_copy(update={"base": ModelRef(model=str(tmp_path / "base")), "models": models})
    result = run(on_disk, tmp_path / "out", threads=2)
    assert checksum(load_file(result.out / "model.safetensors")) == expected[name]


HASH = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from matrix import CODECS, MemorySource, NAMES, merged, models
sources = {name: MemorySource(tensors, name) for name, tensors in models().items()}
print(*[merged(name, sources) for name in NAMES + CODECS])
"""


def test_same_bytes_whatever_the_hash_seed(expected: dict[str, str]) -> None:
    """The order of sets and of hashed names differs between processes; the bytes do not."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", HASH, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [expected[name] for name in ALL]


def _in_child(payload: bytes) -> list[tuple[str, int, np.ndarray]]:
    task, context = pickle.loads(payload)
    torch.set_num_threads(1)
    written: list[tuple[str, int, np.ndarray]] = []

    class Collect(Sink):
        def begin(self, keys: Any) -> None:
            """No room is needed."""

        def write(self, name: str, start: int, bits: np.ndarray) -> None:
            written.append((name, start, bits.copy()))

    execute([Variant(task, context, Collect())])
    return written


def _nothing(count: int) -> None:
    pass


def test_same_bytes_in_another_process(memory: Sources) -> None:
    """Tasks, sources and summaries cross processes: what a cluster needs."""
    jobs: list[bytes] = []
    wanted: list[tuple[str, dict[str, torch.Tensor]]] = []
    for name in NAMES:
        recipe, inputs = given(name, memory)
        plan = planned(name, recipe, inputs)
        context = context_of(plan, inputs)
        context = replace(context, found=measure_model(plan.tasks, context, SerialRunner()))
        sink = MemorySink()
        carry_out(plan, inputs, sink)
        for task in plan.tasks[::4]:
            jobs.append(pickle.dumps((task, replace(context, progress=_nothing))))
            wanted.append((name, sink.tensors()))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for (name, whole), written in zip(wanted, pool.map(_in_child, jobs, chunksize=8), strict=True):
            for tensor, start, bits in written:
                there: Any = whole[tensor].view(torch.int16).numpy()
                rows = there[start : start + bits.shape[0]] if bits.ndim else there
                assert np.array_equal(rows, bits.view(np.int16)), (name, tensor)
