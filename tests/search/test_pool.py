"""Frank-Wolfe in coefficients: equal to the same in weights, for any score, and its laws."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kit import noise
from tune.toy import Net, net, world
from weightsmith.core.errors import RecipeError
from weightsmith.jobs.nested import RecipeSource, open_inputs
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.table import write_table
from weightsmith.search.frank_wolfe import INITIAL, FrankWolfe
from weightsmith.search.local import Steps, iterate
from weightsmith.search.pool import Options, Walk
from weightsmith.tune.objectives.labels import Labels

BASE, EXPERTS, DATA = world(3)
NAMES = [n for n, _ in BASE.named_parameters()]


def call(module: nn.Module, batch: Any) -> Tensor:
    found: Tensor = module(batch[0])
    return found


def walk(options: Options, experts: Any = None) -> Walk:
    experts = EXPERTS if experts is None else experts
    tree = {"base": "base", "models": {name: name for name in experts}, "method": "ties"}
    module = net()
    module.load_state_dict(BASE.state_dict())
    return Walk(
        tree, {**sources(experts), **sources({"base": BASE.state_dict()})}, module, DATA, call, Labels(), options
    )


def sources(models: Any) -> dict[str, Any]:
    from weightsmith.io.read.open import open_source

    return {name: open_source(dict(state)) for name, state in models.items()}


def gradient(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in weights.items()}
    module = Net().eval()
    pairs = [pair for part in DATA.values() for pair in part]
    total = sum(Labels().loss(torch.func.functional_call(module, leaves, (x,)), (x, y)) for x, y in pairs)
    (total / sum(map(len, DATA.values()))).backward()
    return {n: leaf.grad for n, leaf in leaves.items()}


def weights(coefficients: Tensor, names: list[str]) -> dict[str, Tensor]:
    base = BASE.state_dict()
    return {n: base[n] + sum(float(c) * (e[n] - base[n]) for c, e in zip(row, EXPERTS.values(), strict=True))
            for n, row in zip(names, coefficients, strict=True)}  # fmt: skip


@pytest.mark.parametrize("granularity", ["task", "layer"])
@pytest.mark.parametrize("score", ["cosine", "inner", "inner_delta"])
def test_the_same_iterates_as_in_weights(score: str, granularity: str) -> None:
    here = walk(Options(granularity=granularity, score=score, step_size=1.0))
    start = weights(here.coefficients, here.names)
    there = FrankWolfe(granularity, score, step_size=1.0, iterations=4)
    pool = {name: state.__getitem__ for name, state in EXPERTS.items()}
    for t, step in enumerate(there.run(start, pool, gradient)):
        stride = here.step(t)
        assert {n: stride.chosen[n] for n in NAMES} == {n: step.chosen[n] for n in NAMES}
        assert stride.gap == pytest.approx(step.gap, rel=1e-3, abs=1e-5)
        for n, value in weights(here.coefficients, here.names).items():
            assert torch.allclose(value, step.weights[n], atol=1e-5)


@pytest.mark.parametrize("start", ["all", "base"])
@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_ties_trims_the_way_to_the_vertex(granularity: str, start: str, tmp_path: Path) -> None:
    """w <- w + size trim(v - w), by the sheet, with the iterate read out of its recipe."""
    for name, state in {"base": BASE.state_dict(), **EXPERTS}.items():
        (tmp_path / name).mkdir()
        save_file(dict(state), tmp_path / name / "model.safetensors")
    tree = {"base": str(tmp_path / "base"), "models": {name: str(tmp_path / name) for name in EXPERTS}}
    options = Options(granularity=granularity, local="ties", density=0.3, start=start, step_size=1.0)
    given = (None, net(), DATA, call, Labels(), options)
    here = Steps(tree, options, lambda n: tmp_path / f"{n}.safetensors", lambda t: Walk(t, *given, leave=True))
    base = dict(BASE.state_dict())
    w = {n: t + (0.3 if start == "all" else 0) * sum(e[n] - t for e in EXPERTS.values()) for n, t in base.items()}
    pool, inner = {**EXPERTS, INITIAL: dict(w)}, FrankWolfe(granularity, "cosine")
    chosen = set()
    for t in range(4):
        slope = gradient(w)
        scores = {v: {n: inner.of(slope[n], x[n], w[n]) for n in NAMES} for v, x in pool.items()}
        best = inner.choose(scores)
        ways = {n: pool[best[n]][n] - w[n] for n in NAMES}
        sizes = torch.cat([way.abs().reshape(-1) for way in ways.values()]).sort(descending=True).values
        for n, way in ways.items():
            kept = max(1, int(0.3 * way.numel()))
            each = way.abs().reshape(-1).sort(descending=True).values[kept - 1]
            least = sizes[int(0.3 * len(sizes))] if granularity == "task" else each
            w[n] = w[n] + 0.3 * 2 / (t + 2) * torch.where(way.abs() >= least, way, 0.0)
        stride = here.step(t)
        assert stride.chosen == best
        chosen |= set(best.values())
        write_table(tmp_path / f"{t + 1}.safetensors", here.models, {"weight": here.table()})
        recipe = Recipe.model_validate(iterate(tree, t + 1, options, lambda n: tmp_path / f"{n}.safetensors"))
        made = RecipeSource(recipe, open_inputs(recipe))
        assert all(torch.allclose(made.read(n).float(), w[n], atol=1e-5) for n in NAMES)
    assert len(chosen) > 1 or granularity == "task"


def test_line_search_never_rises() -> None:
    here = walk(Options(score="inner", line_search=True, start="base"))
    losses = [here.loss()]
    for t in range(5):
        here.step(t)
        losses.append(here.loss())
    assert losses[-1] < losses[0]
    assert all(after <= before + 1e-6 for before, after in pairwise(losses))
    assert (here.coefficients >= 0).all()
    assert (here.coefficients.sum(1) <= 1 + 1e-9).all()


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_irrelevant_checkpoints_are_not_chosen_and_the_order_says_nothing(granularity: str) -> None:
    """Checkpoints that lie uphill of the start at every iterate, which is a vertex too."""
    options = Options(score="inner", granularity=granularity, start="base", step_size=0.3)
    plain, base = walk(options), BASE.state_dict()
    slopes, strides = [], []
    for t in range(4):
        slopes.append(gradient(weights(plain.coefficients, plain.names)))
        strides.append(plain.step(t))
    far = {}
    for i in range(16):
        shares = noise(len(slopes), seed=900 + i).abs().tolist()
        up = {n: sum(c * g[n] / g[n].norm() for c, g in zip(shares, slopes, strict=True)) for n in NAMES}
        if all((g[n] * up[n]).sum() > 0 for g in slopes for n in NAMES):
            far[f"x{i}"] = {n: base[n] + up[n] for n in NAMES}
    assert len(far) >= 3
    more = walk(options, {**far, **EXPERTS})
    assert [more.step(t).chosen for t in range(4)] == [stride.chosen for stride in strides]
    assert torch.allclose(more.coefficients[:, len(far) :], plain.coefficients, atol=1e-6)
    assert (more.coefficients[:, : len(far)] == 0).all()


@pytest.mark.parametrize("local", ["task_arithmetic", "adamerging"])
@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_soft_takes_a_vertex_for_each_task(local: str, granularity: str) -> None:
    options = Options(
        "soft", granularity, "inner", start="base", scaling=0.03, local=local, inner_steps=10, inner_lr=0.05
    )
    here = walk(options)
    before = here.loss()
    stride = here.step(0)
    for words in stride.chosen.values():
        names = (words or "").split("+")
        assert len(names) == len(set(names)) == 3  # none twice
        assert set(names) <= {*EXPERTS, INITIAL}
    assert here.loss() < before


def test_tensors_without_a_gradient_do_not_move() -> None:
    here = walk(Options(score="cosine"))
    for p in here.resident.module.head.parameters():
        p.requires_grad_(False)
    stride = here.step(0)
    begun = walk(Options()).coefficients
    for row, name in enumerate(here.names):
        still = torch.equal(here.coefficients[row], begun[row])
        assert (stride.chosen[name] is None) == name.startswith("head")
        assert still or not name.startswith("head")


@pytest.mark.parametrize(
    "given",
    [
        {"variant": "medium"},
        {"score": "cos"},
        {"step_size": 0},
        {"inner_steps": 0},
        {"density": 0},
        {"local": "adamerging"},
        {"line_search": True, "local": "ties"},
        {"line_search": True, "variant": "soft"},
        {"line_search": "yes"},
        {"tolerance": "small"},
    ],
)
def test_options_are_checked(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="frank_wolfe: "):
        Options(**given)


def test_an_empty_pool() -> None:
    with pytest.raises(RecipeError, match="pool is empty"):
        Walk({"base": "base", "models": {}}, None, net(), DATA, call, Labels())
