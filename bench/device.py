"""python -m bench.device [--device cuda:0] [--size full] [--experts 3] : how near merges on a GPU come to its link.

GB/s of copies from pinned memory to the device and back, of copies within the device (read and written bytes), and of
merges of made-up models (`bench.models`): bytes read and written by wall time, the process's start left out.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.models import SHAPES, make_models
from bench.table import markdown
from weightsmith.core.errors import WeightsmithError
from weightsmith.devices.accelerator import Accelerator, accelerator_of
from weightsmith.jobs.merge import run
from weightsmith.recipe.schema import Recipe

__all__ = ["link", "main", "merges"]

METHODS = ("task_arithmetic", "ties", "dare", "slerp", "tsvm")
GIVEN = {"slerp": {"t": 0.5}, "dare": {"density": 0.5}}


def link(accelerator: Accelerator, nbytes: int, repeat: int) -> list[tuple[str, float]]:
    """GB/s to the first device, from it, and within it: the best of `repeat` copies of `nbytes`."""
    device = accelerator.devices()[0]
    staged = accelerator.staging(nbytes)
    with accelerator.using(device, accelerator.stream(device)):
        one, other = (torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2))

        def rate(copy: Callable[[Tensor, Tensor], object], to: Tensor, source: Tensor, moved: int) -> float:
            best = float("inf")
            for _ in range(repeat):
                began = time.perf_counter()
                copy(to, source)
                accelerator.wait(accelerator.mark())
                best = min(best, time.perf_counter() - began)
            return moved / best / 1e9

        return [
            ("host to device", rate(accelerator.copy_in, one, staged, nbytes)),
            ("device to host", rate(accelerator.copy_out, staged, one, nbytes)),
            ("within the device", rate(Tensor.copy_, other, one, 2 * nbytes)),
        ]


def merges(accelerator: Accelerator, root: Path, size: str, experts: int, repeat: int) -> list[tuple[str, float]]:
    """GB/s of whole merges from files to a folder, by method: the best of `repeat`, inputs in the page cache."""
    base, *rest = make_models(root / "models", size, experts)
    found = []
    for name in METHODS:
        kept = rest[:1] if name == "slerp" else rest
        recipe = Recipe.model_validate({
            "base": str(base), "models": {path.name: str(path) for path in kept}, "method": name,
            "parameters": GIVEN.get(name, {}),
        })  # fmt: skip
        rates = []
        for _ in range(repeat):
            out = root / "device-out"
            shutil.rmtree(out, ignore_errors=True)
            done = run(recipe, out, device=accelerator)
            moved = sum(path.stat().st_size for model in (base, *kept) for path in model.glob("*.safetensors"))
            rates.append((moved + done.write_bytes) / done.seconds / 1e9)
        shutil.rmtree(out)
        found.append((f"merge: {name}, {len(kept)} + base", max(rates)))
    return found


def main(arguments: list[str] | None = None, accelerator: Accelerator | None = None) -> int:
    """Print the table; 2 and one line where there is no GPU.  `accelerator`: instead of the one that is named."""
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--size", choices=sorted(SHAPES), default="full")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path(".bench"))
    options = parser.parse_args(arguments)
    try:
        found = accelerator or accelerator_of(options.device)
    except WeightsmithError as error:
        print(f"nothing measured: {error}", file=sys.stderr)
        return 2
    if found is None:
        print(f"nothing measured: {options.device} is no accelerator; name cuda or cuda:0", file=sys.stderr)
        return 2
    rows = link(found, options.megabytes << 20, options.repeat)
    rows += merges(found, options.folder.absolute(), options.size, options.experts, options.repeat)
    name = torch.cuda.get_device_name(found.devices()[0]) if found.kind == "cuda" else found.kind
    print(f"{name}, torch {torch.__version__}\n")
    to_device = rows[0][1]
    shown = [(what, f"{rate:.3g}", f"{rate / to_device:.0%}") for what, rate in rows]
    print(markdown([("what", "GB/s", "of host to device"), *shown]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
