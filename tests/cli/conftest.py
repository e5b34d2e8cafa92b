"""Small checkpoints on disk, and a recipe over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from weightsmith.core import method

SHAPES = {"model.layers.0.mlp.up_proj.weight": (8, 4), "model.norm.weight": (4,)}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """base, a and b with constant weights 0, 1 and 3, and recipe.yaml beside them."""
    for name, value in (("base", 0.0), ("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        tensors = {n: np.full(shape, value, np.float32) for n, shape in SHAPES.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    path = tmp_path / "recipe.yaml"
    path.write_text("base: base\nmodels: {a: a, b: b}\nmethod: linear\n")
    return path


@pytest.fixture
def registry() -> Iterator[None]:
    """Methods that a test registers are forgotten after it."""
    method.registered()
    before = dict(method._registered)
    yield
    method._registered.clear()
    method._registered.update(before)
