"""Stages in a row do what they do one after another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import weightsmith
from kit import noise
from weightsmith.core.checks import Count
from weightsmith.core.method import BASE, Filter, GroupMethod, Method, Pipeline, Stage, registered
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource
from weightsmith.jobs.nested import RecipeSource
from weightsmith.methods.consensus import Consensus
from weightsmith.methods.dare import Dare
from weightsmith.methods.iso_c import IsoC
from weightsmith.methods.iso_cts import IsoCts
from weightsmith.methods.lines import Lines
from weightsmith.methods.task_arithmetic import TaskArithmetic
from weightsmith.methods.ties import Ties
from weightsmith.methods.tsvm import Tsvm
from weightsmith.recipe.schema import Recipe

Model = dict[str, Tensor]
BLOCKS = 3


SHAPES = {
    "model.embed_tokens.weight": (10, 6),
    **{f"model.layers.{i}.mlp.up_proj.weight": (8, 6) for i in range(BLOCKS)},
    **{f"model.layers.{i}.norm.weight": (6,) for i in range(BLOCKS)},
}
BASE_MODEL: Model = {n: noise(*s, seed=i) for i, (n, s) in enumerate(SHAPES.items())}
EXPERTS: dict[str, Model] = {
    f"e{j}": {n: b + 0.1 * noise(*b.shape, seed=100 * j + i + 50) for i, (n, b) in enumerate(BASE_MODEL.items())}
    for j in range(3)
}


def merge(*stages: Stage, experts: dict[str, Model] | None = None, seed: int = 0) -> Model:
    return weightsmith.merge(experts or EXPERTS, Pipeline(stages), BASE_MODEL, seed=seed)


def delta(model: Model) -> Model:
    return {n: t - BASE_MODEL[n] for n, t in model.items()}


def around_base(change: Model) -> Model:
    return {n: BASE_MODEL[n] + t for n, t in change.items()}


def equal(got: Model, want: Model, atol: float = 1e-6) -> None:
    for name, tensor in want.items():
        assert torch.allclose(got[name], tensor, atol=atol), (name, float((got[name] - tensor).abs().max()))


def changed(a: Model, b: Model) -> bool:
    return any(not torch.allclose(a[n], b[n], atol=1e-4) for n in a)


@pytest.mark.parametrize("method", [Ties(), Tsvm(), IsoC(), IsoCts()], ids=lambda m: m.name)
class TestBehind:
    def test_lines_scales_the_merged_task_vector_by_depth(self, method: Method):
        alpha, beta = 0.3, 0.6
        plain = delta(merge(method))
        depth = {n: int(n.split(".")[2]) / (BLOCKS - 1) for n in plain if ".layers." in n}
        want = {n: t * (alpha + beta * depth[n] if n in depth else alpha) for n, t in plain.items()}
        got = merge(method, Lines(alpha=alpha, beta=beta))
        equal(got, around_base(want))
        assert changed(got, around_base(plain))

    def test_alpha_by_itself_is_the_ratio_of_norms_over_the_model(self, method: Method):
        plain = delta(merge(method))
        summed = sum(float(sum(e[n] - BASE_MODEL[n] for e in EXPERTS.values()).abs().sum()) for n in plain)
        alpha = summed / sum(float(t.abs().sum()) for t in plain.values()) / len(EXPERTS)
        equal(merge(method, Lines(beta=0.0)), around_base({n: t * alpha for n, t in plain.items()}), atol=1e-5)

    @pytest.mark.parametrize("k", [1, 2])
    def test_consensus_keeps_what_enough_task_masks_select(self, method: Method, k: int):
        plain, strictness = delta(merge(method)), 0.4
        want = {}
        for name, tau in plain.items():
            deltas = [e[name] - BASE_MODEL[name] for e in EXPERTS.values()]
            votes = sum((d.abs() > strictness * (tau - d).abs()).int() for d in deltas)
            want[name] = torch.where(votes >= k, tau, 0.0)
        got = merge(method, Consensus(k=k, lambda_=1.0, tall_mask_lambda=strictness))
        equal(got, around_base(want))
        assert k == 1 or changed(got, around_base(plain))


def parametrised(cls: type[Stage]) -> bool:
    """Methods of task vectors that need nothing else and merge tensors one by one."""
    counts = [check.high for check in cls.traits.checks if isinstance(check, Count)]
    grouped = issubclass(cls, GroupMethod)
    return issubclass(cls, Method) and cls.traits.needs == (BASE,) and not grouped and not any(counts)


METHODS = [name for name, cls in registered().items() if parametrised(cls) and name != "keep"]


def test_the_list_is_not_short():
    assert {"ties", "tsvm", "iso_c", "iso_cts", "knots", "pcb", "opcm", "doge", "wudi", "sce", "breadcrumbs"} & set(
        METHODS
    ) >= {"ties", "tsvm", "iso_c", "iso_cts", "knots", "opcm", "wudi"}


@pytest.mark.parametrize("name", METHODS)
def test_dare_before_any_method_is_that_method_of_thinned_experts(name: str):
    cls = registered()[name]
    method = cls(**({"iters": 3} if any(p.name == "iters" for p in cls.parameters()) else {}))
    dare = Dare(density=0.6)
    thin = {e: merge(dare, TaskArithmetic(), experts={e: m}, seed=5) for e, m in EXPERTS.items()}
    assert changed(thin["e0"], EXPERTS["e0"])
    equal(merge(dare, method, seed=5), merge(method, experts=thin, seed=5), atol=3e-5)


def test_tsvm_within_a_nested_merge_is_a_merge_of_its_result():
    inner = merge(Tsvm())
    want = weightsmith.merge({"inner": inner, "e2": EXPERTS["e2"]}, Pipeline((Ties(density=0.5),)), BASE_MODEL)
    held = {n: MemorySource(m, n) for n, m in EXPERTS.items()}
    recipe = Recipe.model_validate({"base": "b", "models": {n: n for n in EXPERTS}, "method": "tsvm"})
    base = MemorySource(BASE_MODEL, "base")
    nested = RecipeSource(recipe, Inputs(base, held))
    got = weightsmith.merge({"inner": nested, "e2": held["e2"]}, Pipeline((Ties(density=0.5),)), base)
    assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("behind", [[], [Lines(alpha=0.4, beta=0.5)], [Consensus()]], ids=["", "lines", "consensus"])
@pytest.mark.parametrize("name", METHODS)
def test_adapters_merge_as_the_models_that_they_make(tmp_path: Path, name: str, behind: list[Filter]):
    """Where the method takes products, and where it does not."""
    cls = registered()[name]
    method = cls(**({"iters": 3} if any(p.name == "iters" for p in cls.parameters()) else {}))
    base = MemorySource(BASE_MODEL, "base")
    experts = {f"e{i}": open_source(adapter(tmp_path / f"e{i}", i), base=base) for i in range(2)}
    full = {n: {k: s.read(k) for k in s.keys} for n, s in experts.items()}
    pipeline = Pipeline((method, *behind))
    equal(weightsmith.merge(experts, pipeline, base), weightsmith.merge(full, pipeline, BASE_MODEL), atol=3e-5)


def adapter(folder: Path, seed: int, rank: int = 2) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for i in range(BLOCKS):
        place = f"base_model.model.model.layers.{i}.mlp.up_proj"
        tensors[f"{place}.lora_A.weight"] = 0.3 * noise(rank, 6, seed=10 * seed + i)
        tensors[f"{place}.lora_B.weight"] = 0.3 * noise(8, rank, seed=10 * seed + i + 500)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
