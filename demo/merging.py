"""The merges of the demo: recipe files, run by the real command, with the coefficient chosen on validation data."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from demo.family import BASE, Family, Scores, fingerprint
from weightsmith.study.cache import engine


@dataclass(frozen=True)
class Candidate:
    """One method with one choice of its coefficients; `stages` is the recipe's `method`."""

    stages: tuple[tuple[str, Mapping[str, float]], ...]
    label: str  # of the choice, as the table shows it

    def recipe(self, models: Mapping[str, str], base: str, seed: int) -> str:
        """The recipe file's text.  models: name -> path, relative to the recipe."""
        lines = [f"base: {base}", "models:"]
        lines += [f"  {name}: {path}" for name, path in models.items()]
        lines.append("method:")
        for name, parameters in self.stages:
            inside = ", ".join(f"{key}: {value}" for key, value in parameters.items())
            lines.append(f"  - {name}: {{{inside}}}" if inside else f"  - {name}")
        return "\n".join([*lines, f"seed: {seed}", ""])


def grid(*stages: tuple[str, Mapping[str, tuple[float, ...]]]) -> tuple[Candidate, ...]:
    """Every combination of the values given; what has several values is what the label shows."""
    axes = [(at, key, values) for at, (_, axis) in enumerate(stages) for key, values in axis.items()]
    made = []
    for values in product(*(values for _, _, values in axes)):
        parts: list[tuple[str, dict[str, float]]] = [(name, {}) for name, _ in stages]
        shown = []
        for (at, key, options), value in zip(axes, values, strict=True):
            parts[at][1][key] = value
            if len(options) > 1:
                shown.append(f"{key} {value:g}")
        made.append(Candidate(tuple(parts), ", ".join(shown)))
    return tuple(made)


METHODS: Mapping[str, tuple[Candidate, ...]] = {
    "average": grid(("average", {})),
    "task arithmetic": grid(("task_arithmetic", {"lambda": (0.3, 0.4, 0.5, 0.7)})),
    "TIES": grid(("ties", {"density": (0.2, 0.5), "lambda": (1.0, 1.5)})),
    "DARE-TIES": grid(("dare", {"density": (0.5, 0.8)}), ("ties", {"density": (1.0,), "lambda": (1.0, 1.5)})),
    "TSV merge": grid(("tsvm", {"scaling": (1.0, 1.5)})),
}


def merge(recipe: Path, out: Path) -> None:
    """`weightsmith merge RECIPE OUT --overwrite`, without the seconds a new process takes to import torch."""
    from weightsmith.cli.main import main

    arguments = ["merge", str(recipe), str(out), "--overwrite", "--threads", "2", "--quiet"]
    status = main(arguments)
    if status:
        raise SystemExit(f"weightsmith {' '.join(arguments)} failed with exit code {status}")


@dataclass(frozen=True)
class Bench:
    """One seed of a family: its checkpoints, and the scores of merges of them."""

    family: Family
    seed: int
    folder: Path
    scores: Scores

    def model(self, name: str, split: str) -> dict[str, float]:
        """Scores of one of the trained checkpoints."""
        key = fingerprint(self.folder.name, name, split)
        return self.scores.get(key, lambda: self.family.scores(self.family.file(self.folder, name), self.seed, split))

    def recipe(self, method: str, candidate: Candidate) -> Path:
        """The recipe file of a merge, beside the checkpoints it names."""
        models = {name_for(task): self.family.file(self.folder, task).name for task in self.family.tasks}
        text = candidate.recipe(models, self.family.file(self.folder, BASE).name, self.seed)
        file = self.folder / f"{name_for(' '.join([method, candidate.label]))}.yaml"
        file.write_text(text, "utf-8")
        return file

    def merged(self, method: str, candidate: Candidate, split: str) -> dict[str, float]:
        """Scores of a merge, which is made by the command if it was not before."""
        recipe = self.recipe(method, candidate)

        def measure() -> dict[str, float]:
            out = self.folder / "merged" / f"{recipe.stem}-{engine()}"
            if not out.is_dir():
                merge(recipe, out)
            return self.family.scores(out, self.seed, split)

        key = fingerprint(self.folder.name, recipe.read_text("utf-8"), engine(), split)
        return self.scores.get(key, measure)

    def forget(self) -> None:
        """Delete the merged models: their scores are kept, and a merge is quickly made again."""
        shutil.rmtree(self.folder / "merged", ignore_errors=True)


def name_for(words: str) -> str:
    """A plain file name: 'rotate 90' -> 'rotate-90', 'TIES density 0.5, lambda 1' -> 'ties-density-0.5-lambda-1'."""
    return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")


def choose(benches: list[Bench], method: str) -> tuple[Candidate, dict[str, float]]:
    """The candidate with the best validation score, over all tasks and seeds, and every candidate's score."""
    candidates = METHODS[method]
    if len(candidates) == 1:
        return candidates[0], {}
    tried: dict[str, Any] = {}
    for candidate in candidates:
        found = [bench.merged(method, candidate, "validation")[task] for bench in benches for task in _tasks(benches)]
        tried[candidate.label] = sum(found) / len(found)
    better = max if benches[0].family.higher_is_better else min
    best = better(candidates, key=lambda candidate: tried[candidate.label])
    return best, tried


def _tasks(benches: list[Bench]) -> tuple[str, ...]:
    return benches[0].family.tasks
