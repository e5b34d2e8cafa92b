"""python -m bench.search FOLDER [--candidates 100 --blocks 24]: what the candidates of a search cost.

Seconds to build a candidate that differs from others in numbers only, against a merge by itself, in one process.  The
score costs nothing, so that the rest of the time is the search's own.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weightsmith.jobs.merge import run
from weightsmith.recipe.schema import Recipe
from weightsmith.search.api import search


def model(folder: Path, seed: int, blocks: int, width: int = 896) -> None:
    """A stack of bfloat16 matrices as large as Qwen2-0.5B's (24 blocks: 0.36e9 in the blocks, 0.14e9 embeddings)."""
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (151_936, width)}
    for i in range(blocks):
        for name, shape in (("q", (width, width)), ("o", (width, width)), ("k", (128, width)), ("v", (128, width))):
            shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = shape
        for name, shape in (("gate", (4864, width)), ("up", (4864, width)), ("down", (width, 4864))):
            shapes[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
    save_file({n: torch.randn(s, generator=draw).bfloat16() for n, s in shapes.items()}, folder / "model.safetensors")


def main() -> None:
    """Print seconds of candidates and of single merges, and their ratio."""
    read = argparse.ArgumentParser(prog="bench.search")
    read.add_argument("folder", type=Path)
    read.add_argument("--candidates", type=int, default=100)
    read.add_argument("--blocks", type=int, default=24)
    read.add_argument("--method", default="task_arithmetic")
    asked = read.parse_args()
    for i, name in enumerate(("base", "a", "b", "c")):
        model(asked.folder / name, i, asked.blocks)
    recipe: dict[str, Any] = {
        "base": str(asked.folder / "base"),
        "models": {n: str(asked.folder / n) for n in "abc"},
        "method": asked.method,
    }
    singles = max(2, asked.candidates // 10)
    began = time.perf_counter()
    for i in range(singles):
        weight = {"weight": 0.1 + 0.01 * i}
        run(Recipe.model_validate({**recipe, "parameters": weight}), asked.folder / "single", overwrite=True)
    single = (time.perf_counter() - began) / singles
    for data in ("dev", "test"):
        (asked.folder / data).write_text(data)
    file = {
        "recipe": recipe,
        "space": {"weight": {"low": 0.0, "high": 1.0, "per": "model"}},
        "score": {"command": "true {data}", "data": {s: str(asked.folder / d) for s, d in
                                                     (("search", "dev"), ("report", "test"))}},
        "sampler": "random", "evaluations": asked.candidates, "batch": 8, "together": 8, "rescore": 0,
        "controls": False,
    }  # fmt: skip
    for in_memory in (True, False):
        out = asked.folder / f"search-{in_memory}"
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        made = search(file, out, lambda tensors, split: 0.0, in_memory=in_memory)
        each = made.cost.build_seconds / made.cost.evaluations
        own = (time.perf_counter() - began - made.cost.build_seconds) / made.cost.evaluations
        kind = "in memory" if in_memory else "in folders"
        print(f"{kind}: {each:.2f} s a candidate, single merge {single:.2f} s, ratio {each / single:.2f}; "
              f"the search itself {own:.3f} s a candidate")  # fmt: skip
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
