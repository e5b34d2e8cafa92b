"""Three points around one base; a model's score on a task is 100 minus its distance from that task's point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TASKS = ("red", "green", "blue")

EVALUATOR = """
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def scores(model, split, data, offset=0.0):
    with open(Path(data) / "calls", "a") as file:
        file.write(f"{split}\\n")
    path = model if model.is_file() else model / "model.safetensors"
    state = load_file(path)
    here = np.concatenate([state[key].ravel() for key in sorted(state)])
    targets = load_file(Path(data) / f"{split}.safetensors")
    return {name: 100 + offset - float(np.linalg.norm(here - target)) for name, target in targets.items()}
"""

STUDY = """
title: Colours
about: Three points around one base.
base: base.safetensors
models: {red: red.safetensors, green: green.safetensors, blue: blue.safetensors}
joint: joint.safetensors
guards: [grey]
score: closeness
evaluate: {function: {data: DATA}}
methods:
  average: linear
  sum: {task_arithmetic: {lambda: [0.25, 0.5, 1.0]}}
  TIES: {ties: {density: [0.5, 1.0]}}
"""


def save(file: Path, flat: np.ndarray) -> None:
    """24 numbers as two blocks."""
    halves = flat.astype(np.float32).reshape(2, 3, 4)
    save_file({f"blocks.{at}.weight": half.copy() for at, half in enumerate(halves)}, file)


def make(folder: Path, seed: int = 0, text: str = STUDY, validation: float = 0.25) -> Path:
    """Write models, targets, score.py and study.yaml; returns the study's path.

    The points are orthogonal steps of length 4 from the base.  On validation the targets lie where a sum with
    lambda `validation` leads, on test where lambda 1 does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    base = 10 * draw.normal(size=24)
    steps = {name: 4 * np.eye(24)[at] for at, name in enumerate(TASKS)}
    save(folder / "base.safetensors", base)
    for name, step in steps.items():
        save(folder / f"{name}.safetensors", base + step)
    total = sum(steps.values())
    save(folder / "joint.safetensors", base + total)
    for split, reach in (("validation", validation), ("test", 1.0)):
        targets = {name: (base + (step if split == "test" else reach * total)) for name, step in steps.items()}
        save_file(
            {k: v.astype(np.float32) for k, v in {**targets, "grey": base}.items()}, folder / f"{split}.safetensors"
        )
    (folder / "score.py").write_text(EVALUATOR)
    study = folder / "study.yaml"
    study.write_text(text.replace("DATA", str(folder)))
    return study


def calls(folder: Path) -> list[str]:
    """The splits that the evaluator was asked for so far."""
    file = folder / "calls"
    return file.read_text().split() if file.exists() else []
