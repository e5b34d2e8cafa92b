"""Three points around one base, scored by a small program that needs no torch; runs of suites on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TASKS = ("red", "green", "blue")

PROGRAM = """
import json, struct, sys
model, task, room = sys.argv[1:4]
name = model if model.endswith(".safetensors") else model + "/model.safetensors"
data = open(name, "rb").read()
size = struct.unpack("<Q", data[:8])[0]
head = json.loads(data[8 : 8 + size])
values = []
for key in sorted(k for k in head if k != "__metadata__"):
    a, b = head[key]["data_offsets"]
    values += struct.unpack(f"<{(b - a) // 4}f", data[8 + size + a : 8 + size + b])
open(room + "/calls", "a").write(task + "\\n")
at = {"red": 0, "green": 1, "blue": 2, "grey": 3}[task.partition("_")[0]]
base = json.load(open(room + "/base.json"))
reach = (values[at] - base[at]) / 4  # 0 at the base, 1 at the expert
away = sum(abs(v - b) for v, b in zip(values, base)) / 4
score = max(0.0, 0.5 + 0.4 * min(reach, 2 - reach) if at < 3 else 0.8 - 0.1 * away)
n = 100
examples = [1.0] * round(score * n) + [0.0] * (n - round(score * n))
if task.endswith("_loss"):
    score, examples = 1 - score, [1 - e for e in examples]
print(json.dumps({"score": sum(examples) / n, "examples": examples}))
"""

RUN = """
suite: mergebench
base: base.safetensors
models: {red: red.safetensors, green: green.safetensors, blue: blue.safetensors}
homes: {math: red, coding: green, safety: blue}
tasks:
  red: {domain: math, program: {command: PROGRAM}}
  green: {domain: coding, program: {command: PROGRAM}}
  blue: {domain: safety, program: {command: PROGRAM}}
methods:
  average: linear
  sum: {task_arithmetic: {lambda: 1.0}}
"""


def save(file: Path, flat: np.ndarray) -> None:
    halves = flat.astype(np.float32).reshape(2, 3, 4)
    save_file({f"blocks.{at}.weight": half.copy() for at, half in enumerate(halves)}, file)


def make(folder: Path, text: str = RUN, **changes: Any) -> Path:
    """Write models, the program and run.yaml; returns the run's path.  Experts are steps of 4 in one entry each."""
    folder.mkdir(parents=True, exist_ok=True)
    base = np.arange(24, dtype=np.float64)
    save(folder / "base.safetensors", base)
    for at, name in enumerate(TASKS):
        save(folder / f"{name}.safetensors", base + 4 * np.eye(24)[at])
    save(folder / "joint.safetensors", base + 4 * np.eye(24)[:3].sum(0))
    (folder / "base.json").write_text(json.dumps(base.tolist()))
    (folder / "score.py").write_text(PROGRAM)
    run = folder / "run.yaml"
    run.write_text(text.replace("PROGRAM", f'"python {folder}/score.py {{model}} {{task}} {folder}"'))
    return run


def calls(folder: Path) -> list[str]:
    """The tasks that the program was asked for so far."""
    file = folder / "calls"
    return file.read_text().split() if file.exists() else []
