"""Classifiers that are averaged without a base: heads that were trained apart are said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightsmith.jobs.merge import run
from weightsmith.recipe.schema import Recipe


@pytest.mark.parametrize("apart", [True, False])
def test_heads_that_were_trained_apart(apart: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    body, head = torch.randn(8, 8), torch.randn(3, 8)
    for name in "ab":
        own = torch.randn(3, 8) if apart else head + 0.1 * torch.randn(3, 8)
        tensors = {"encoder.weight": body + 0.1 * torch.randn(8, 8), "classifier.weight": own}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    models = {name: str(tmp_path / f"{name}.safetensors") for name in "ab"}
    result = run(Recipe.model_validate({"models": models, "method": "linear"}), tmp_path / "out")
    text = "classifier.weight of b did not begin as that of a: the mean of heads that were trained apart seldom works"
    assert any(text in str(warning) for warning in result.warnings) == apart
