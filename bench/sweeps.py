"""python -m bench.sweeps [--size small] [--values 8] [NAME ...] : a sweep over N values against N runs.

Whole processes of `weightsmith merge` with one thread each.  Processor seconds are what counts; every variant's
tensors must be those of the run of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import weightsmith
from bench.measure import BenchError, Usage, measure, plain_environment
from bench.models import SHAPES, make_models
from bench.table import markdown

__all__ = ["SWEEPS", "Swept", "main"]


@dataclass(frozen=True)
class Swept:
    """A sweep: methods in order, and the parameter of the first of them that takes values from `first` to `last`."""

    method: Sequence[Mapping[str, Mapping[str, Any]]]
    parameter: str
    first: float
    last: float

    def sets(self, count: int) -> list[str]:
        """`count` assignments, each of one value."""
        step = (self.last - self.first) / max(count - 1, 1)
        (name,) = self.method[0]
        return [f"method.0.{name}.{self.parameter}={self.first + i * step:.4g}" for i in range(count)]


_VOTE = {"density": 1.0, "scope": "tensor", "zero_sign": "plus"}
SWEEPS: Mapping[str, Swept] = {
    "ties by density": Swept([{"ties": {}}], "density", 0.1, 0.8),
    "ties by lambda": Swept([{"ties": {}}], "lambda", 0.3, 1.0),
    "ties per tensor by density": Swept([{"ties": {"scope": "tensor"}}], "density", 0.1, 0.8),
    "ties per tensor by lambda": Swept([{"ties": {"scope": "tensor"}}], "lambda", 0.3, 1.0),
    "magnitude by density": Swept([{"magnitude": {}}, {"task_arithmetic": {}}], "density", 0.1, 0.8),
    "breadcrumbs by density": Swept([{"breadcrumbs": {}}, {"task_arithmetic": {}}], "density", 0.1, 0.8),
    "dare_ties by density": Swept([{"dare": {}}, {"ties": _VOTE}], "density", 0.1, 0.8),
    "task_arithmetic by lambda": Swept([{"task_arithmetic": {}}], "lambda", 0.3, 1.0),
    **{
        f"{name} by scaling": Swept([{name: {}}], "scaling", 0.3, 1.0)
        for name in ("tsvm", "r_tsvm", "iso_c", "iso_cts", "wudi", "swudi", "aswudi", "optmerge")
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sweeps", description="a sweep against runs one by one")
    parser.add_argument("names", nargs="*", help=f"{', '.join(SWEEPS)}; all if none is given")
    parser.add_argument("--size", choices=SHAPES, default="small", help="small: 28 M parameters")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--values", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="models and outputs")
    options = parser.parse_args(arguments)
    base, *experts = make_models(options.folder.absolute() / "models", options.size, options.experts)
    rows = [["sweep", "N runs, CPU s", "one sweep, CPU s", "share", "N runs, wall s", "one sweep, wall s", "peak MB"]]
    for name in options.names or SWEEPS:
        try:
            rows.append(_row(name, options.folder.absolute() / "sweeps", base, experts, options.values))
        except BenchError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        print(" | ".join(rows[-1]), flush=True)
    print("\n" + markdown(rows))
    return 0


def _row(name: str, root: Path, base: Path, experts: Sequence[Path], count: int) -> list[str]:
    swept = SWEEPS[name]
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    given = {"base": str(base), "models": {one.name: str(one) for one in experts}, "method": swept.method}
    recipe = root / "recipe.json"
    recipe.write_text(json.dumps(given))
    assignments = swept.sets(count)
    key = assignments[0].partition("=")[0]
    values = [text.partition("=")[2] for text in assignments]
    merge(recipe, root / "warm", assignments[0])  # inputs into the page cache, kernels into theirs
    together = merge(recipe, root / "all", f"{key}={','.join(values)}")
    alone = []
    for value, assignment in zip(values, assignments, strict=True):
        alone.append(merge(recipe, root / "one", assignment))
        (made,) = (root / "all").glob(f"*={value}/model.safetensors")
        if made.read_bytes() != (root / "one" / "model.safetensors").read_bytes():
            raise BenchError(f"{name}: {assignment} of the sweep is not what a run of its own makes")
        shutil.rmtree(root / "one")
    shutil.rmtree(root)
    cpu, wall = sum(run.cpu for run in alone), sum(run.wall for run in alone)
    share = f"{together.cpu / cpu:.0%}"
    peaks = f"{together.rss / 1e6:.0f} ({max(run.rss for run in alone) / 1e6:.0f})"
    return [name, f"{cpu:.1f}", f"{together.cpu:.1f}", share, f"{wall:.1f}", f"{together.wall:.1f}", peaks]


def merge(recipe: Path, out: Path, assignment: str) -> Usage:
    """Run the command of the code that is imported here."""
    own = {"PYTHONPATH": str(Path(weightsmith.__file__).parents[1])}
    command = [sys.executable, "-m", "weightsmith", "merge", str(recipe), str(out), "--threads", "1"]
    return measure([*command, "--set", assignment], plain_environment() | own)


if __name__ == "__main__":
    sys.exit(main())
