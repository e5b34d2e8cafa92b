"""Learned coefficients beside merges that learn nothing: the demo's digits, several seeds.

    python -m study.learned            three seeds, a few minutes of one core; prints a table in Markdown

Numbers are learned from images of the validation part, half of which chooses the best step; grids of merges without
learning are chosen by the accuracy on all of it, with labels.  Accuracies are of the test part, means over the tasks,
with 95% intervals by bootstrap over test images, the same draws for every row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo.digits import LENSES, TASKS, Digits, Network, Split, splits
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightsmith as ws
from weightsmith.io.read.source import MemorySource
from weightsmith.tune.controls import RandomSigns

ROOT = Path(__file__).resolve().parent.parent
State = Mapping[str, Tensor]
BATCH, DRAWS = 45, 1000
GRIDS: Mapping[str, Mapping[str, Any]] = {
    "task_arithmetic": {"lambda": (0.2, 0.3, 0.4, 0.5, 0.7)},
    "ties": {"lambda": (0.4, 0.7, 1.0, 1.4)},
    "tsvm": {"scaling": (0.5, 0.7, 1.0, 1.4)},
}


class Seed:
    """One seed's models and data."""

    def __init__(self, seed: int, steps: int) -> None:
        self.steps, self.seed, self.family = steps, seed, Digits()
        folder = self.family.checkpoints(ROOT / ".demo", seed, lambda text: None)
        self.models = {n: load_file(folder / f"{n}.safetensors") for n in ("base", "joint", *TASKS)}
        self.parts = splits(seed)

    def found(self, name: str) -> Tensor:
        """Which test images the model of a row finds; measured once, and kept in .study/learned."""
        words = "".join(letter if letter.isalnum() else "-" for letter in name)
        file = ROOT / ".study" / "learned" / f"{words}-steps{self.steps}-seed{self.seed}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"right": self.right(ROWS[name](self), "test")}, file)
        return load_file(file)["right"]

    def module(self, state: State) -> Network:
        made = Network(self.family.settings.width)
        made.load_state_dict(state)
        return made.eval()

    @torch.no_grad()
    def right(self, state: State, part: str) -> Tensor:
        """Which images' classes are found: [tasks, images] bool."""
        module, data = self.module(state), self.parts[part]
        return torch.stack([module(LENSES[lens](data.images)).argmax(1) == data.labels for lens in TASKS])

    def searched(self, method: str) -> State:
        """The merge with the best number of a grid, by labels of the validation part."""
        ((name, grid),) = GRIDS[method].items()
        experts = {task: self.models[task] for task in TASKS}
        made = [ws.merge(experts, method, base=self.models["base"], **{name: value}) for value in grid]
        return max(made, key=lambda state: float(self.right(state, "validation").double().mean()))

    def learned(self, preset: str, few: int = 0, noise: bool = False, labels: bool = False, **options: Any) -> State:
        """The merge that a preset learns; few: images of each task instead of half of the validation part."""
        part = self.parts["validation"]
        half = len(part.labels) // 2
        data = {lens: _batches(part, lens, slice(0, few or half), labels) for lens in TASKS}
        validation = {lens: _batches(part, lens, slice(half, None), labels) for lens in TASKS}
        base = MemorySource(self.models["base"], "base")
        experts: dict[str, Any] = {task: MemorySource(self.models[task], task) for task in TASKS}
        if noise:
            experts = {task: RandomSigns(source, base, task, self.seed) for task, source in experts.items()}
        module = self.module(self.models["base"])
        ws.tune(
            space=preset, data=data, validation=validation, module=module, models=experts, base=base, controls=False,
            **{"steps": self.steps, **options},
        )  # fmt: skip
        return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _batches(part: Split, lens: str, which: slice, labels: bool) -> list[Any]:
    images = LENSES[lens](part.images[which])[:, None].split(BATCH)
    if not labels:
        return list(images)
    return list(zip(images, part.labels[which].split(BATCH), strict=True))


ROWS: Mapping[str, Callable[[Seed], State]] = {
    "base": lambda s: s.models["base"],
    "joint training": lambda s: s.models["joint"],
    **{f"{method}, searched": lambda s, method=method: s.searched(method) for method in GRIDS},
    "adamerging, task-wise": lambda s: s.learned("adamerging", granularity="task", lr=0.01),
    "adamerging": lambda s: s.learned("adamerging", lr=0.01),
    "adamerging, random changes": lambda s: s.learned("adamerging", lr=0.01, noise=True),
    "adamerging_pp, task-wise": lambda s: s.learned("adamerging_pp", granularity="task", lr=0.01),
    "adamerging_pp": lambda s: s.learned("adamerging_pp", lr=0.01),
    "atlas, labels": lambda s: s.learned("atlas", labels=True, lr=0.02),
    "atlas, 5 labels": lambda s: s.learned("atlas", labels=True, few=5, lr=0.02),
    "atlas, 5 labels, random changes": lambda s: s.learned("atlas", labels=True, few=5, lr=0.02, noise=True),
    "atlas, test time": lambda s: s.learned("atlas", goal="test_time", init=0.3, lr=0.01),
    "concrete": lambda s: s.learned("concrete", lr=0.05),
    "concrete, tsvm": lambda s: s.learned("concrete", inner="tsvm", lr=0.05),
    "expert_merging, 5 images": lambda s: s.learned("expert_merging", few=5, steps=10, pull=0.1),
    "expert_merging": lambda s: s.learned("expert_merging", steps=10, pull=0.1),
    "expert_merging_pp": lambda s: s.learned("expert_merging_pp", steps=10, pull=0.1),
}
"""Name -> what makes the model of a seed."""


def row(right: list[Tensor]) -> tuple[float, float, float, list[float]]:
    """Mean accuracy over seeds, its 95% interval, and the accuracy of each seed; in percent.

    right: of each seed [tasks, images]
    """
    draw = np.random.Generator(np.random.PCG64(0))
    means = np.zeros(DRAWS)
    for one in right:
        images = one.double().mean(0).numpy()
        means += images[draw.integers(len(images), size=(DRAWS, len(images)))].mean(1) / len(right)
    low, high = (100 * np.quantile(means, [0.025, 0.975])).tolist()
    each = [100 * float(one.double().mean()) for one in right]
    return sum(each) / len(each), low, high, each


def main() -> None:
    """Train what is missing, learn, and print."""
    reader = argparse.ArgumentParser(prog="python -m study.learned")
    reader.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    reader.add_argument("--steps", type=int, default=60)
    reader.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    given = reader.parse_args()
    seeds = [Seed(seed, given.steps) for seed in given.seeds]
    print(f"| digits | accuracy, % | 95% interval | seeds {', '.join(map(str, given.seeds))} |")
    print("| --- | ---: | ---: | --- |")
    for name in given.only:
        mean, low, high, each = row([seed.found(name) for seed in seeds])
        print(f"| {name} | {mean:.1f} | {low:.1f} to {high:.1f} | {', '.join(f'{x:.1f}' for x in each)} |", flush=True)


if __name__ == "__main__":
    main()
