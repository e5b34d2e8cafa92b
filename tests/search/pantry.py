"""A base and three experts on disk, and a recipe's distance to a wanted mixture of them as its score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

SHAPES = {
    "embed_tokens.weight": (8, 4),
    **{f"layers.{i}.{m}.weight": (6, 4) for i in range(4) for m in ("self_attn.q_proj", "mlp.up_proj")},
    "lm_head.weight": (8, 4),
}
MODELS = ("a", "b", "c")
WANTED = {"a": 0.7, "b": 0.2, "c": -0.1}

RECIPE = {"base": "base", "models": {name: name for name in MODELS}, "method": "task_arithmetic",
          "parameters": {"weight": 0.3}}  # fmt: skip
PER_MODEL = {"weight": {"low": -0.5, "high": 1.0, "per": "model"}}

SCORE = """
import os
from pathlib import Path
from safetensors.numpy import load_file

HOME = Path(__file__).parent
WANTED = {"a": 0.7, "b": 0.2, "c": -0.1}
MODELS = {n: load_file(HOME / n / "model.safetensors") for n in ("base", "a", "b", "c")}


def far(found, name):
    return float(sum(((found[k] - MODELS[name][k]) ** 2).mean() for k in found))


def scores_of_tensors(tensors, data):
    log = HOME / "log"
    count = len(log.read_text().split()) + 1 if log.exists() else 1
    with log.open("a") as file:
        file.write(Path(data).stem + "\\n")
    if str(count) == os.environ.get("DIE"):
        os.kill(os.getpid(), 9)
    found = {k: v.float().numpy() for k, v in tensors.items()}
    base = MODELS["base"]
    aim = {k: base[k] + sum(w * (MODELS[n][k] - base[k]) for n, w in WANTED.items()) for k in found}
    return {"near": -float(sum(((found[k] - aim[k]) ** 2).sum() for k in found)),
            "a": -far(found, "a"), "b": far(found, "b")}
"""


def stocked(folder: Path) -> Path:
    """The models, dev.txt, test.txt and score.py in a folder."""
    draw = np.random.default_rng(0)
    for name in ("base", *MODELS):
        (folder / name).mkdir()
        tensors = {key: draw.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}
        save_file(tensors, folder / name / "model.safetensors")
    (folder / "dev.txt").write_text("dev")
    (folder / "test.txt").write_text("test")
    (folder / "score.py").write_text(SCORE)
    return folder


def tree(folder: Path, **more: Any) -> dict[str, Any]:
    """A search as a tree, with absolute paths."""
    recipe = {**RECIPE, "base": str(folder / "base"), "models": {n: str(folder / n) for n in MODELS}}
    score = {"file": str(folder / "score.py"), "data": splits(folder)}
    found = {"recipe": recipe, "space": PER_MODEL, "score": score, "goals": {"near": "max"}, "rescore": 1,
             "controls": False}  # fmt: skip
    return {**found, **more}


def splits(folder: Path) -> dict[str, str]:
    return {"search": str(folder / "dev.txt"), "report": str(folder / "test.txt")}


def tensors_of(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    return {name: load_file(folder / name / "model.safetensors") for name in ("base", *MODELS)}
