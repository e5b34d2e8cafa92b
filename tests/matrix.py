"""Every registered method and codec as a recipe on small models, and the layouts, runners and cuts to try it with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from goldens import tiny_llama
from kit import GIVEN, count_for, stage_of
from reliability.runs import save_sharded
from weightsmith.core.method import Codec, Filter, Method, registered
from weightsmith.engine.carry import carry_out
from weightsmith.engine.runner import Runner, SerialRunner, ThreadRunner
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource, Source
from weightsmith.io.write.output import FolderSink
from weightsmith.io.write.sink import MemorySink
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec

NAMES = sorted(name for name, cls in registered().items() if issubclass(cls, (Filter, Method)) and name != "keep")
CODECS = sorted(name for name, cls in registered().items() if issubclass(cls, Codec))
BARE: dict[str, dict[str, Any]] = {
    **GIVEN,
    **{"slerp": {"t": 0.3}, "dare": {"density": 0.6}, "rmm": {"rank": 2, "level": "tensor"}},
}
"""Parameters that are needed, and those whose defaults would do little."""


def small(arrays: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A part of the tiny Llama that has every kind of tensor."""
    kept = ("model.layers.0.mlp", "model.layers.1.self_attn.q_proj", "model.embed", "model.norm")
    return {name: torch.from_numpy(a).to(dtype) for name, a in arrays.items() if name.startswith(kept)}


def models() -> dict[str, dict[str, torch.Tensor]]:
    base, experts = tiny_llama.make(5, 3)
    return {n: small(a, torch.bfloat16) for n, a in (("base", base), *((f"e{i}", e) for i, e in enumerate(experts)))}


def stats() -> dict[str, list[dict[str, torch.Tensor]]]:
    positive = tiny_llama.positive(5, 3)
    made = {"fisher": positive, "second_moment": positive, "gram": tiny_llama.grams(5, 3)}
    return {stat: [small(d, torch.float32) for d in found] for stat, found in made.items()}


def given(name: str, sources: dict[str, Source]) -> tuple[Recipe, Inputs]:
    kept = [f"e{i}" for i in range(count_for(stage_of(name, **BARE.get(name, {}))))]
    found = {s: {f"e{i}": MemorySource(d[i], s) for i in range(len(kept))} for s, d in stats().items()}
    recipe = Recipe(
        base=ModelRef(model="base"),
        models={n: ModelRef(model=n) for n in kept},
        method=(StageSpec(name=name, parameters=BARE.get(name, {})),),
    )
    return recipe, Inputs(sources["base"], {n: sources[n] for n in kept}, found)


def merged(name: str, sources: dict[str, Source], threads: int = 1, **how: Any) -> str:
    """Checksum over all tensors of the result, by name."""
    recipe, inputs = given(name, sources)
    sink = MemorySink()
    carry_out(planned(name, recipe, inputs, threads), inputs, sink, **how)
    return checksum(sink.tensors())


def planned(name: str, recipe: Recipe, inputs: Inputs, threads: int = 1) -> Plan:
    return make_plan(recipe, sources=inputs, threads=threads, encode=name in CODECS)


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    state = xxhash.xxh3_128()
    for name in sorted(tensors):
        state.update(name.encode() + tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


# --- layouts of the inputs -------------------------------------------------------------------------


def single(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_sharded(tensors, folder, 1)


def sharded(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_sharded(tensors, folder, 3)


def pickled(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")


def pickled_shuffled(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    names = list(tensors)
    random.Random(1).shuffle(names)
    pickled({name: tensors[name] for name in names}, folder)


def reversed_data(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """The header names the tensors in another order, and their data lies in another order too."""
    folder.mkdir()
    at, entries, data = 0, {}, b""
    for name in sorted(tensors, reverse=True):
        raw = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        entries[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [at, at + len(raw)]}
        at, data = at + len(raw), data + raw
    header = json.dumps(dict(sorted(entries.items(), key=lambda item: item[0][::-1]))).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)


LAYOUTS = [single, sharded, pickled, pickled_shuffled, reversed_data]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Source]]:
    folder = tmp_path_factory.mktemp("layouts")
    for save in LAYOUTS:
        (folder / save.__name__).mkdir()
        for model, tensors in models().items():
            save(tensors, folder / save.__name__ / model)
    return {s.__name__: {m: open_source(folder / s.__name__ / m) for m in models()} for s in LAYOUTS}


@pytest.fixture(scope="module")
def memory() -> dict[str, Source]:
    return {name: MemorySource(tensors, name) for name, tensors in models().items()}


class Shuffled:
    """A runner as a cluster is one: tasks are done in any order, answers come in the order of the tasks."""

    remote = False

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        waiting = list(tasks)
        order = list(range(len(waiting)))
        random.Random(len(order)).shuffle(order)
        found = {i: function(waiting[i]) for i in order}
        return (found[i] for i in range(len(waiting)))


RUNNERS: list[Runner] = [SerialRunner(), Shuffled(), ThreadRunner(2)]
SIZES = [1, 5000, 10**9]


def check(name: str, sources: dict[str, Source], size: int, runner: Runner, out: Path) -> str:
    """Merge into files; checksum of what the safetensors library reads back."""
    recipe, inputs = given(name, sources)
    sink = FolderSink(out, shard_size=size, identity={})
    plan = planned(name, recipe, inputs)
    carry_out(plan, inputs, sink, runner=runner)
    with sink.finishing():
        pass
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (sum(key.nbytes for key in plan.keys) > size)
    return checksum({n: t for path in files for n, t in load_file(path).items()})
