"""python -m bench.fusionbench PYTHON [--batch 2 --steps 20] : layer-wise AdaMerging beside FusionBench's.

PYTHON is the interpreter of an environment with torch, transformers, fusion-bench==0.2.33 (pip install --no-deps), and
lightning, omegaconf, hydra-core, bidict, rich).  Both learn from the same checkpoints of the shape of CLIP's ViT-B/32
image tower, drawn, with 8 experts and 8 heads, and from the same batches, each in a process of its own with the same
settings of the allocator and one thread.  FusionBench runs its own loop and merging module; models, batches and heads
are handed to it, since its own come from the hub.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EXPERTS, CLASSES = 8, 20
GATHER = bool(os.environ.get("GATHER"))
SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def make(folder: Path, batch: int, layers: int) -> None:
    """A tower and its fine-tunes in float32; heads, and four batches of each task."""
    torch.manual_seed(0)
    base = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(patch_size=32, num_hidden_layers=layers))
    base.save_pretrained(folder / "base")
    for i in range(EXPERTS):
        torch.manual_seed(i + 1)
        expert = transformers.CLIPVisionModel(base.config)
        expert.load_state_dict({n: t + 0.02 * t.std() * torch.randn(t.shape) if t.is_floating_point() and t.numel() > 1
                                else t for n, t in base.state_dict().items()})  # fmt: skip
        expert.save_pretrained(folder / f"e{i}")
    heads = {f"head.{i}": nn.functional.normalize(torch.randn(CLASSES, 768), dim=1) for i in range(EXPERTS)}
    images = {f"images.{i}.{j}": torch.randn(batch, 3, 224, 224) for i in range(EXPERTS) for j in range(4)}
    save_file({**heads, **images}, folder / "data.safetensors")


def scores(module: Any, images: Tensor, head: Tensor) -> Tensor:
    """Cosines with the classes' directions, times 30."""
    return 30 * nn.functional.normalize(module(pixel_values=images).pooler_output, dim=-1) @ head.T


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Bytes of this process in memory at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def tower(folder: Path) -> Any:
    """The model of a folder, all of it in memory: transformers maps the file, which counts when it is first read."""
    made = transformers.CLIPVisionModel.from_pretrained(folder)
    for parameter in made.parameters():
        parameter.data = parameter.data.clone()
    return made


def ours(folder: Path, steps: int, learnt: Path) -> dict[str, float]:
    """Learn by weightsmith; seconds per step, bytes, and the numbers into a file."""
    from weightsmith.tune.api import tune

    data, module = load_file(folder / "data.safetensors"), tower(folder / "base")
    held, times = resident(), [time.process_time()]
    recipe = {"base": str(folder / "base"), "models": {f"e{i}": str(folder / f"e{i}") for i in range(EXPERTS)},
              "method": "task_arithmetic"}  # fmt: skip
    batches = {f"e{i}": [data[f"images.{i}.{j}"] for j in range(4)] for i in range(EXPERTS)}

    def of(i: int) -> Callable[[Any, Tensor], Tensor]:
        return lambda module, images: scores(module, images, data[f"head.{i}"])

    found = tune(
        recipe, "adamerging", data=batches, module=module, function={f"e{i}": of(i) for i in range(EXPERTS)},
        steps=steps, clamp=(), threads=1, gather=GATHER, progress=lambda *_: times.append(time.process_time()),
    )  # fmt: skip
    save_file({name: values.contiguous() for name, values in found.coefficients["weight"].items()}, learnt)
    return {"seconds": (times[-1] - times[1]) / (steps - 1), "beyond": peak() - held}


def theirs(folder: Path, steps: int, learnt: Path) -> dict[str, float]:
    """Learn by FusionBench's own loop; the same figures."""
    from importlib import import_module

    algorithm = import_module("fusion_bench.method.adamerging.layer_wise_adamerging").LayerWiseAdaMergingAlgorithm
    dictionary = import_module("omegaconf").DictConfig
    data = load_file(folder / "data.safetensors")
    times: list[float] = []

    class Pool:
        """Models by name."""

        model_names = tuple(f"e{i}" for i in range(EXPERTS))
        held = 0

        def load_model(self, name: str) -> Any:
            made = tower(folder / ("base" if name == "_pretrained_" else name))
            self.held = self.held or resident()  # with one model
            return made

    class Batches:
        """The same batches again and again."""

        def __init__(self, place: int) -> None:
            self.place, self.step = place, 0

        def __iter__(self) -> Batches:
            return self

        def __next__(self) -> tuple[Tensor]:
            if self.place == 0:
                times.append(time.process_time())
            self.step += 1
            return (data[f"images.{self.place}.{(self.step - 1) % 4}"],)

    class Learned(algorithm):  # type: ignore[misc, valid-type]
        """With models and data that are at hand."""

        def on_test_time_adaptation_start(self) -> None:
            self.loaders = {f"e{i}": Batches(i) for i in range(EXPERTS)}

        def get_shuffled_test_loader_iter(self, task: str) -> Any:
            return self.loaders[task]

        def compute_logits(self, module: Any, images: Tensor, task: str) -> Tensor:
            return scores(module, images, data[f"head.{task[1:]}"])

        def test_time_adaptation(self, module: Any) -> Any:
            self.names = [name for name, _ in module.pretrained_model.named_parameters()]
            found = super().test_time_adaptation(module)
            times.append(time.process_time())
            self.numbers = found.merge_weight.detach().T.contiguous()
            return found

        def log_hyperparams(self, *given: Any, **more: Any) -> None:
            """Nothing is logged."""

    pool = Pool()
    config = {"weights": None, "init_values": 0.3, "clamp_weights": False, "tie_weights": True, "strict": False,
              "optimizer": "adam", "lr": 1e-3, "max_steps": steps, "save_merging_weights": False}  # fmt: skip
    learned = Learned(dictionary(config))
    learned.run(pool)
    save_file(dict(zip(learned.names, (row.clone() for row in learned.numbers), strict=True)), learnt)
    return {"seconds": (times[-1] - times[1]) / (steps - 1), "beyond": peak() - pool.held}


def apart(python: str, what: str, folder: Path, steps: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What a process of its own finds."""
    learnt = folder / f"{what}.safetensors"
    words = [python, "-m", "bench.fusionbench", python, "--in", str(folder), "--only", what, "--steps", str(steps)]
    done = subprocess.run(words, env={**os.environ, **SETTINGS}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), load_file(learnt)


def main() -> None:
    """Print a line of JSON for each, and one that compares them."""
    reader = argparse.ArgumentParser(prog="bench.fusionbench")
    reader.add_argument("python", help="interpreter of the environment with fusion-bench")
    reader.add_argument("--batch", type=int, default=2)
    reader.add_argument("--steps", type=int, default=20)
    reader.add_argument("--layers", type=int, default=12, help="12 are ViT-B/32's")
    reader.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    reader.add_argument("--only", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    given = reader.parse_args()
    if given.only is not None:
        torch.set_num_threads(1)
        work = {"ours": ours, "theirs": theirs}[given.only]
        print(json.dumps(work(given.folder, given.steps, given.folder / f"{given.only}.safetensors")))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, given.batch, given.layers)
        mine, numbers = apart(sys.executable, "ours", folder, given.steps)
        print(json.dumps({"weightsmith": mine}), flush=True)
        peer, wanted = apart(given.python, "theirs", folder, given.steps)
        print(json.dumps({"FusionBench": peer}), flush=True)
    apart_by = {name: float((numbers[name] - values).abs().max()) for name, values in wanted.items()}
    worst = max(apart_by, key=apart_by.__getitem__)
    moved = max(float((values - 0.3).abs().max()) for values in wanted.values())
    print(json.dumps({
        "time": round(mine["seconds"] / peer["seconds"], 3), "memory": round(mine["beyond"] / peer["beyond"], 3),
        "largest difference": apart_by[worst], "at": worst, "numbers moved by up to": round(moved, 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
