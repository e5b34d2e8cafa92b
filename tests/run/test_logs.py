"""`mwa` by what the trainer logged: full checkpoints and adapters of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightsmith
from kit import texts
from weightsmith.core.errors import PlanError
from weightsmith.jobs.merge import run
from weightsmith.jobs.nested import open_inputs
from weightsmith.methods.mwa import Mwa
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import Recipe

LOSSES = {50: 8.0, 100: 4.0, 150: 3.0, 200: 1.0}
"""Logged every 50 steps, a checkpoint every 100."""


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.layers.0.mlp.up_proj.weight": torch.full((4, 3), float(value))}


@pytest.fixture
def training(tmp_path: Path) -> Path:
    history: list[dict[str, Any]] = [{"step": s, "loss": v, "learning_rate": 1e-4} for s, v in LOSSES.items()]
    history.append({"step": 200, "eval_loss": 0.5})
    for step in (100, 200):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file(tensors(step), folder / "model.safetensors")
        shown = [entry for entry in history if entry["step"] <= step]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": shown}))
    return tmp_path


def merged(training: Path, **parameters: Any) -> float:
    """Share of the later checkpoint."""
    models = {f"c{step}": training / f"checkpoint-{step}" for step in (100, 200)}
    found = weightsmith.merge(models, "mwa", **parameters)
    assert isinstance(found, dict)
    (tensor,) = found.values()
    return (float(tensor[0, 0]) - 100) / 100


def test_losses_come_from_the_log(training: Path) -> None:
    assert merged(training) == pytest.approx((1 / 1) / (1 / 1 + 1 / 4))
    assert merged(training, smooth="since") == pytest.approx((1 / 2) / (1 / 2 + 1 / 6))
    assert merged(training, metric="steps") == pytest.approx(200 / 300)
    assert merged(training, penalty=2.0) == pytest.approx(16 / 17)
    assert merged(training, value={"c100": 1.0, "c200": 3.0}) == pytest.approx(0.25)
    assert merged(training, value={"c100": 0.25}) == pytest.approx(0.2), "the other one's from the log"


def test_the_plan_says_the_weights(training: Path) -> None:
    models = {f"c{step}": str(training / f"checkpoint-{step}") for step in (100, 200)}
    recipe = Recipe.model_validate({"models": models, "method": "mwa"})
    assert "mwa: weights 0.2, 0.8" in texts(make_plan(recipe, sources=open_inputs(recipe)).warnings)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "config.json"):
        (training / "checkpoint-100" / name).write_text("{}")
    run(recipe, training / "out")
    found = {path.name for path in (training / "out").iterdir()}
    assert found == {"model.safetensors", "config.json", "weightsmith.json", "README.md"}, "training cannot go on"
    assert float(load_file(training / "out/model.safetensors").popitem()[1][0, 0]) == pytest.approx(180)


def test_what_is_not_logged_is_named(training: Path) -> None:
    with pytest.raises(PlanError, match=r"c100: .*checkpoint-100/trainer_state.json: no eval_loss logged for step 100"):
        merged(training, source="eval")
    (training / "checkpoint-200/trainer_state.json").unlink()
    with pytest.raises(PlanError, match=r"c200: .*no trainer_state.json in it or beside it"):
        merged(training)
    assert merged(training, metric="steps") == pytest.approx(200 / 300), "the name is enough"
    with pytest.raises(PlanError, match="mwa: a score is not in the log; give each model's value"):
        merged(training, metric="score")


def test_models_that_are_no_checkpoints() -> None:
    models = {"a": tensors(0), "b": tensors(1)}
    with pytest.raises(PlanError, match=r"mwa: a: .* is no checkpoint's folder and has no log; give its value instead"):
        weightsmith.merge(models, "mwa")
    found = weightsmith.merge(models, "mwa", penalty=0.0)
    assert isinstance(found, dict)
    assert float(found.popitem()[1][0, 0]) == 0.5, "an even average needs no log"


def test_a_logged_loss_that_the_rule_cannot_take(training: Path) -> None:
    path = training / "checkpoint-200/trainer_state.json"
    path.write_text(path.read_text().replace("1.0", "-1.0"))
    with pytest.raises(PlanError, match=r"values above 0, not -1 \(model 2 of 2\); use rule softmax or rank"):
        merged(training)
    assert merged(training, rule="rank") == pytest.approx(2 / 3)


def test_without_the_engine_all_count_alike() -> None:
    assert Mwa().fused(3).weights == (1.0, 1.0, 1.0)
