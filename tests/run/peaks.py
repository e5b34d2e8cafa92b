"""Peak memory of every registered method against what its plan predicts, each in a forked process.

    python tests/run/peaks.py ROWS COLUMNS EXPERTS [METHOD ...]      prints: name, predicted, measured, before

A child begins with the memory of its parent, which has everything imported: that part is measured, not predicted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weightsmith.core.checks import Case
from weightsmith.core.method import Codec, Filter, Grain, MergedFilter, Stage, StandaloneCodec, registered
from weightsmith.plan.costs import costs_of
from weightsmith.recipe.schema import StageSpec

STATISTICS = ("gram", "fisher", "second_moment")
BARE = {"slerp": {"t": 0.3}, "dare": {"density": 0.6}, "mwa": {"value": 2.0}}
PAIR = "pair"
"""Name of a file with two matrices that make up a group."""
FEW = ("steps", "iterations", "epochs", "max_iterations", "iters")


class Peak(NamedTuple):
    """Bytes that a process may take as planned, that it took, and that it had taken before its first task."""

    predicted: int
    measured: int
    before: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def stage_of(name: str, **more: Any) -> Stage:
    """A stage with its defaults, but few steps: they take time, not memory."""
    cls = registered()[name]
    few = {p.field: max(2, int(p.low)) for p in cls.parameters() if p.name in FEW}
    return cls(**{**BARE.get(name, {}), **few, **more})


def spec(stage: Stage) -> StageSpec:
    """As a recipe says it."""
    given = {p.name: getattr(stage, p.field) for p in stage.parameters()}
    return StageSpec(name=stage.name, parameters={name: value for name, value in given.items() if value is not None})


def methods() -> list[str]:
    """All of them, filters and codecs too."""
    return sorted(name for name in registered() if name != "keep")


def models(folder: Path, rows: int, columns: int, experts: int, dtype: str = "F32", stats: Iterable[str] = ()) -> None:
    """Folders base, e0, e1, ... with one matrix each, and stats-0, ... with what `observe` would have written."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((rows, columns), np.float32)
    for i in range(experts + 1):
        values = first + 0.1 * rng.standard_normal((rows, columns), np.float32)
        write(folder / ("base" if i == 0 else f"e{i - 1}"), "model", values, dtype)
        write(folder / PAIR / ("base" if i == 0 else f"e{i - 1}"), PAIR, values, dtype)
    for i in range(experts):
        for stat in stats:
            made = np.abs(first) if stat != "gram" else np.eye(columns, dtype=np.float32) * (i + 1)
            about = {"stat": stat, "examples": 3, "rows": 96, "aliases": {}}
            write(folder / f"stats-{i}", stat, made, "F32", {"weightsmith": json.dumps(about)})


def write(folder: Path, name: str, values: np.ndarray, dtype: str = "F32", about: dict[str, str] | None = None) -> None:
    bits = values.astype(np.float32).view(np.uint32)
    data = (bits >> 16).astype(np.uint16) if dtype == "BF16" else bits
    header: dict[str, Any] = {"__metadata__": about} if about else {}
    kinds = ("up", "down") if name == PAIR else ("up",)
    for i, kind in enumerate(kinds):
        shape, place = values.shape[:: -1 if i else 1], [i * data.nbytes, (i + 1) * data.nbytes]
        header[f"model.layers.0.mlp.{kind}_proj.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": place}
    raw = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _ in kinds:
            file.write(data.tobytes())


def peak_of(folder: Path, stages: list[Stage], experts: int, threads: int = 1, fork: bool = True) -> Peak:
    """Run one merge (or compression) over the models in `folder`, in a forked child."""
    from weightsmith.jobs.nested import open_inputs
    from weightsmith.plan.plan import make_plan
    from weightsmith.plan.room import resident
    from weightsmith.recipe.schema import ModelRef, Recipe

    folder = folder / PAIR if any(s.grain is Grain.GROUP for s in stages) else folder
    stats = any(n in STATISTICS for s in stages for n in s.traits.needs)
    recipe = Recipe(
        base=ModelRef(model=str(folder / "base")),
        models={
            f"e{i}": ModelRef(model=str(folder / f"e{i}"), stats=(str(folder / f"stats-{i}"),) if stats else ())
            for i in range(experts)
        },
        method=tuple(map(spec, stages)),
    )
    inputs = open_inputs(recipe)
    encode = isinstance(stages[-1], Codec)
    plan = make_plan(recipe, sources=inputs, threads=threads, encode=encode)
    if not fork:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            _run(recipe, Path(out) / "out", encode, threads)
        return Peak(plan.peak_bytes, plan.peak_bytes, 0)
    read, write_ = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before = _status("VmRSS")
            with tempfile.TemporaryDirectory(dir=folder) as out:
                _run(recipe, Path(out) / "out", encode, threads)
                os.write(write_, f"{before} {_status('VmHWM')}".encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write_)
    with os.fdopen(read) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, [s.name for s in stages]
    before, measured = map(int, text.split())
    imports = sum(costs_of(s).imports for s in stages)
    return Peak(plan.peak_bytes - resident(plan.tasks, inputs) + imports + before, measured, before)


def _run(recipe: Any, out: Path, encode: bool, threads: int) -> None:
    from weightsmith.jobs.compress import compress
    from weightsmith.jobs.merge import run

    if encode:
        compress(recipe, out, threads=threads, accept_loss=True)  # what noise loses is not the question
    else:
        run(recipe, out, threads=threads)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def stages_for(name: str) -> list[Stage]:
    stage = stage_of(name)
    if isinstance(stage, Filter):
        plain = stage_of("task_arithmetic")
        return [plain, stage] if isinstance(stage, MergedFilter) else [stage, plain]
    if isinstance(stage, Codec) and not isinstance(stage, StandaloneCodec):
        return [stage_of("ties"), stage]
    return [stage]


def count_for(name: str, most: int) -> int:
    stages = stages_for(name)
    return next(n for n in (*range(most, 0, -1), most + 1) if all(s.refusal(Case(n)) is None for s in stages))


def warm_up() -> None:
    """Import and touch in this process what every child will use: it is the process, not the tensors."""
    import torch

    from weightsmith.cli.process import own_process

    own_process()  # as the command line does
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models(Path(folder), 16, 16, 2, stats=STATISTICS)
        for name in ("ties", "dare", "tsvm", "regmean", "wudi", "tall_masks"):
            peak_of(Path(folder), stages_for(name), 2, fork=False)


def main() -> None:

    warm_up()
    rows, columns, experts = map(int, sys.argv[1:4])
    with tempfile.TemporaryDirectory() as folder:
        models(Path(folder), rows, columns, experts, stats=STATISTICS)
        for name in sys.argv[4:] or methods():
            found = peak_of(Path(folder), stages_for(name), count_for(name, experts))
            print(name, found.predicted, found.measured, found.before, flush=True)


if __name__ == "__main__":
    main()
