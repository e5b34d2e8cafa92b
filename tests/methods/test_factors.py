"""LoRA experts are merged from their factors: the same result, and no task vector in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightsmith
from kit import noise
from test_conformance import Peak
from weightsmith.core.errors import NumericError
from weightsmith.core.method import registry
from weightsmith.engine.sites import Reader
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource, Source
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import Recipe

ROWS, COLUMNS, RANK = 14, 10, 2
WEIGHT = "layers.0.m.weight"
METHODS = ["tsvm", "iso_c", "iso_cts", "knots"]


@pytest.fixture
def base() -> Source:
    return MemorySource({WEIGHT: noise(ROWS, COLUMNS, seed=0), "norm.weight": noise(7, seed=1)}, "base")


def adapter(folder: Path, seed: int, rank: int = RANK, rows: int = ROWS, columns: int = COLUMNS) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["m"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"lora_A": noise(rank, columns, seed=seed), "lora_B": noise(rows, rank, seed=seed + 100)}
    save_file(
        {f"base_model.model.layers.0.m.{n}.weight": t for n, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


@pytest.fixture
def experts(tmp_path: Path, base: Source) -> dict[str, Source]:
    return {f"e{i}": open_source(adapter(tmp_path / f"e{i}", 10 * i + 5, RANK + i), base=base) for i in range(3)}


def dense(experts: dict[str, Source]) -> dict[str, dict[str, Tensor]]:
    return {n: {k: s.read(k) for k in s.keys} for n, s in experts.items()}


@pytest.mark.parametrize("front", METHODS)
@pytest.mark.parametrize("behind", [[], ["lines"], ["consensus"]])
def test_the_result_is_that_of_the_full_models(base: Source, experts: dict[str, Source], front: str, behind: list[str]):
    full = {k: base.read(k) for k in base.keys}
    got = weightsmith.merge(experts, [front, *behind], base)
    want = weightsmith.merge(dense(experts), [front, *behind], full)
    assert not torch.allclose(got[WEIGHT], full[WEIGHT], atol=1e-2)
    for name in full:
        assert torch.allclose(got[name], want[name], atol=2e-5), name


def seen(monkeypatch: pytest.MonkeyPatch, experts: dict[str, Source], method: object, base: Source) -> set[str]:
    """Whether the engine gave the weight's task vectors as factors, with no data beside them, or dense."""
    found, original = set(), Reader.site

    def watched(self, key, *rest):
        site = original(self, key, *rest)
        if key.name == WEIGHT:
            assert not (site.factors and (site.each or site.stack.device.type != "meta"))
            found.add("factors" if site.factors else "dense")
        return site

    monkeypatch.setattr(Reader, "site", watched)
    weightsmith.merge(experts, method, base)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_no_task_vector_is_formed(monkeypatch, base: Source, experts: dict[str, Source], method: str):
    assert seen(monkeypatch, experts, method, base) == {"factors"}


def test_where_factors_do_not_help_all_is_as_ever(monkeypatch, tmp_path: Path, base: Source, experts):
    full = {k: base.read(k) for k in base.keys}
    assert seen(monkeypatch, experts, "ties", base) == {"dense"}
    assert seen(monkeypatch, experts, ["dare", "tsvm"], base) == {"dense"}
    mixed = {**experts, "full": MemorySource({k: t + 1 for k, t in full.items()}, "full")}
    assert seen(monkeypatch, mixed, "tsvm", base) == {"dense"}
    other = MemorySource({k: t + 1 for k, t in full.items()}, "other")
    assert seen(monkeypatch, experts, "tsvm", other) == {"dense"}, "their factors are not the change from this base"


@pytest.mark.parametrize(
    ("method", "parameters"),
    [*((m, {}) for m in METHODS), ("tsvm", {"orthogonalise": "svd"}), ("iso_c", {"solver": "iterate"}),
     ("knots", {"density": 0.3}), ("knots", {"shared": "right", "drop": 0.5})],
)  # fmt: skip
@pytest.mark.parametrize(("count", "rank"), [(2, 4), (8, 16)])
def test_the_plan_knows_what_products_cost(tmp_path: Path, method: str, parameters: dict, count: int, rank: int):
    rows, columns = 640, 384
    base = MemorySource({WEIGHT: noise(rows, columns, seed=0)}, "base")
    experts = {
        f"e{i}": open_source(adapter(tmp_path / f"e{i}", 5 + i, rank, rows, columns), base=base) for i in range(count)
    }
    recipe = Recipe.model_validate(
        {"method": method, "parameters": parameters, "base": "b", "models": {n: n for n in experts}}
    )
    (task,) = make_plan(recipe, sources=Inputs(base, experts)).tasks
    with Peak() as watch:
        weightsmith.merge(experts, registry(method)(**parameters), base)
    assert watch.peak <= task.peak <= 3 * watch.peak
    full = {n: MemorySource({WEIGHT: s.read(WEIGHT)}, n) for n, s in experts.items()}
    (formed,) = make_plan(recipe, sources=Inputs(base, full)).tasks
    assert formed.peak > 2 * task.peak


def test_a_bad_factor_is_refused_by_name(tmp_path: Path, base: Source):
    folder = adapter(tmp_path / "bad", 5)
    tensors = {"lora_A": torch.full((RANK, COLUMNS), torch.inf), "lora_B": noise(ROWS, RANK, seed=1)}
    names = {f"base_model.model.layers.0.m.{n}.weight": t for n, t in tensors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    with pytest.raises(NumericError, match=r"layers.0.m.weight in the adapter of bad holds Inf at \[0, 0\]"):
        weightsmith.merge({"bad": open_source(folder, base=base)}, "tsvm", base)
