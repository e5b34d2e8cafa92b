"""Coefficients of LoRA adapters: the merge is written as an adapter too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightsmith as ws
from tune.test_tune import BASE, DATA, fresh
from weightsmith.core.errors import PlanError
from weightsmith.lora import load, run
from weightsmith.recipe.table import write_table
from weightsmith.tune.api import Tuned, tune
from weightsmith.tune.report import summary

MODULES = {"layers.0": (8, 4), "head": (3, 8)}


def adapter(folder: Path, seed: int, **more: torch.Tensor) -> Path:
    """An adapter of rank 2 on two layers."""
    draw = torch.Generator().manual_seed(seed)
    factors = {}
    for module, (out, into) in MODULES.items():
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, into, generator=draw)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, 2, generator=draw)
    folder.mkdir()
    save_file(factors | more, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(MODULES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tuned(folder: Path, preset: str = "adamerging", **options: Any) -> Tuned:
    save_file({n: t.clone() for n, t in BASE.state_dict().items()}, folder / "base.safetensors")
    models = {f"e{i}": str(folder / f"e{i}") for i in range(2)}
    for i, path in enumerate(models.values()):
        if not Path(path).exists():
            adapter(Path(path), i)
    tree = {"base": str(folder / "base.safetensors"), "models": models, "method": "task_arithmetic"}
    data = {f"e{i}": batches for i, batches in enumerate(DATA.values())}
    return tune(tree, preset, data=data, module=fresh(), out=folder / "out", steps=3, lr=0.05, **options)


@pytest.mark.parametrize(
    ("preset", "options"),
    [("adamerging", {}), ("adamerging", {"granularity": "task"}), ("expert_merging", {"exclude": ()})],
)
def test_the_adapter_on_the_base_is_the_tuned_model(tmp_path: Path, preset: str, options: dict[str, Any]):
    found = tuned(tmp_path, preset, **options)
    assert summary(found)[-1] == f'as an adapter: "weightsmith lora merge {tmp_path}/out/adapter.yaml OUT"'
    run(load(tmp_path / "out" / "adapter.yaml"), tmp_path / "adapter")
    ws.Recipe.load(tmp_path / "out" / "recipe.yaml").run(tmp_path / "merged")
    whole = ws.open_source(tmp_path / "merged")
    again = ws.merge({"a": str(tmp_path / "adapter")}, "task_arithmetic", base=str(tmp_path / "base.safetensors"))
    for name in whole.keys:
        torch.testing.assert_close(again[name], whole.read(name), rtol=1e-5, atol=1e-6)
        assert torch.equal(whole.read(name), BASE.state_dict()[name]) == (name.removesuffix(".weight") not in MODULES)


@pytest.mark.parametrize(
    ("preset", "options", "text"),
    [
        ("adamerging_pp", {}, "the recipe is more than a weighted sum"),
        ("atlas", {"partition": 2}, "the recipe is more than a weighted sum"),
        (
            "expert_merging_pp",
            {"exclude": (), "chunks": {"layers*": 3, "*": 1}},
            "layers.0 has not one learned number for each model",
        ),
    ],
)
def test_what_no_adapter_can_hold_is_said(tmp_path: Path, preset: str, options: dict[str, Any], text: str):
    assert summary(tuned(tmp_path, preset, **options))[-1] == f"no adapter is written: {text}"
    assert not (tmp_path / "out" / "adapter.yaml").exists()


@pytest.mark.parametrize(
    ("method", "values", "text"),
    [
        ("knots", {"head.weight": [1.0, 1.0]}, "coefficients are weights of the methods cat, svd and linear"),
        ("cat", {"head.weight": [1.0, 1.0]}, r"t\.safetensors has no coefficients of layers\.0"),
        ("cat", {"head.weight": [[1.0, 2.0], [1.0, 2.0]]}, "head has several coefficients; an adapter takes one"),
        ("cat", None, r"coefficients: weight: .*t\.safetensors: no such file of coefficients"),
    ],
)
def test_coefficients_that_do_not_fit(tmp_path: Path, method: str, values: Any, text: str):
    for i in range(2):
        adapter(tmp_path / f"e{i}", i)
    if values is not None:
        tensors = {name: torch.tensor(value) for name, value in values.items()}
        write_table(tmp_path / "t.safetensors", ("e0", "e1"), {"weight": tensors})
    (tmp_path / "r.yaml").write_text(f"models: {{e0: e0, e1: e1}}\nmethod: {method}\ncoefficients: t.safetensors\n")
    with pytest.raises(PlanError, match=text):
        run(load(tmp_path / "r.yaml"), tmp_path / "out")
