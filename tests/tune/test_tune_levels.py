"""Tunings in two parts: chunks by importance, and coefficients that look ahead under a mask."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

import weightsmith as ws
from tune.test_tune import BASE, DATA, EXPERTS, Killed, fresh, recipe
from weightsmith.core.errors import RecipeError
from weightsmith.io.read.source import MemorySource
from weightsmith.recipe.load import load
from weightsmith.tune.api import Tuned, tune
from weightsmith.tune.importance import chunks_by, importance
from weightsmith.tune.objectives.entropy import Entropy, entropy
from weightsmith.tune.space import rescaled

TAUGHT = {f"e{i}": batches for i, batches in enumerate(DATA.values())}
PLUS = {"space": "expert_merging_pp", "data": TAUGHT, "steps": 2, "accumulate": 2, "most": 6}
UNDER = {"space": "concrete", "data": DATA, "inner": "layer_wise", "steps": 3, "adamerging_steps": 3, "lr": 0.1}


def go(given: dict[str, Any], out: Path | None, how: dict[str, Any], **more: Any) -> Tuned:
    asked = {"module": fresh(), "threads": 1, **how, **more}
    return tune(given, asked.pop("space"), out=out, **asked)


# --- importance ----------------------------------------------------------------------------------


def test_importance_is_what_is_merged_times_how_far_times_how_large():
    class Two:
        base = MemorySource({"a": torch.zeros(4, 4), "b": torch.zeros(4, 8), "c": torch.zeros(4, 4)}, "base")
        experts = {  # noqa: RUF012
            "x": MemorySource({"a": torch.full((4, 4), 2.0), "b": torch.ones(4, 8), "c": torch.zeros(4, 4)}, "x"),
            "y": MemorySource({"a": torch.full((4, 4), -2.0), "b": torch.ones(4, 8), "c": torch.zeros(4, 4)}, "y"),
        }

    inputs: Any = Two()
    learned = {"a": torch.tensor([0.5, 0.5]), "b": torch.tensor([[0.25], [0.75]]), "c": torch.tensor([1.0, 1.0])}
    found = importance(learned, inputs, list(Two.base.keys.values()))
    # a: 0.5 * 4 = 2 of 16 numbers, b: 0.5 * 2 = 1 of 32; so 1 * 0.5 and 0.5 * 1, and c is 0.
    assert found == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert chunks_by({"a": 1.0, "b": 0.4, "c": 0.05, "d": 0.11}, 10, 0.1) == {"a": 10, "b": 4, "c": 1, "d": 1}


def test_matrices_that_matter_get_more_coefficients(tmp_path: Path):
    module = fresh()
    found = go(recipe(tmp_path), tmp_path / "out", PLUS, module=module).coefficients["factor"]
    counts = {name: values.shape[1] for name, values in found.items()}
    assert max(counts.values()) == 6
    assert len(set(counts.values())) > 1
    first = load_file(tmp_path / "out" / "first" / "coefficients.safetensors")
    assert all(values.shape == (2, 1) for values in first.values())
    ws.Recipe.load(tmp_path / "out" / "recipe.yaml").run(tmp_path / "merged")
    result = ws.open_source(tmp_path / "merged")
    assert all(torch.equal(result.read(n), p.detach()) for n, p in module.named_parameters())


# --- a step ahead --------------------------------------------------------------------------------


def by_hand(steps: int, lr: float, base_lr: float, start: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The masks' numbers after some steps of two levels, with everything in memory; and the outer losses."""
    module = fresh().eval()
    base = {n: p.detach() for n, p in BASE.named_parameters()}
    x = {n: torch.zeros(1, p.numel(), requires_grad=True) for n, p in base.items()}
    lam = {n: torch.full((2,), start, requires_grad=True) for n in base}
    outer = torch.optim.Adam(list(x.values()), lr)
    inner = torch.optim.Adam(list(lam.values()), base_lr)
    losses = []

    def loss(visit: int, step: int) -> torch.Tensor:
        weights = {}
        for i, n in enumerate(sorted(base)):  # draws are numbered as tensors lie in the file
            b = base[n]
            u = torch.rand(x[n].shape, generator=torch.Generator().manual_seed(hash((0, step, i)) & 0x7FFFFFFF))
            m = rescaled(((x[n] + u.clamp(1e-6, 1 - 1e-6).logit()) / 0.5).sigmoid()).reshape(b.shape)
            weights[n] = b + sum(lam[n][k] * m * (s[n] - b) for k, s in enumerate(EXPERTS.values()))
        parts = [Entropy().loss(functional_call(module, weights, (batches[visit % len(batches)][0],)), None)
                 for batches in DATA.values()]  # fmt: skip
        return torch.stack(parts).sum()

    for step in range(steps):
        inner.zero_grad()
        loss(2 * step, step).backward()
        inner.step()
        outer.zero_grad()
        losses.append(loss(2 * step + 1, step))
        losses[-1].backward()
        outer.step()
        with torch.no_grad():
            for value in lam.values():
                value.fill_(start)
    return {n: v.detach() for n, v in x.items()}, [float(one.detach()) for one in losses]


def test_a_step_of_two_levels_is_that_of_autograd(tmp_path: Path):
    go(recipe(tmp_path), tmp_path / "out", UNDER)
    masks, losses = by_hand(3, 0.1, 1.0, 0.3)
    first = load_file(tmp_path / "out" / "first" / "coefficients.safetensors")
    for name, raw in masks.items():
        torch.testing.assert_close(first[f"factor/{name}"], rescaled(raw.sigmoid()), rtol=1e-3, atol=1e-4)
        assert torch.equal(first[f"weight/{name}"], torch.full((2,), 0.3))  # put back
    rows = (tmp_path / "out" / "first" / "curve.csv").read_text().splitlines()[1:]
    # The curve has the mean over the two tasks.
    assert [float(row.split(",")[1]) for row in rows] == pytest.approx([one / 2 for one in losses], rel=1e-4)


def test_coefficients_under_a_mask_merge_to_the_tuned_module(tmp_path: Path):
    module = fresh()
    found = go(recipe(tmp_path), tmp_path / "out", UNDER, module=module)
    assert set(found.coefficients) == {"factor", "weight"}
    assert any(not torch.equal(v, torch.full((2,), 0.3)) for v in found.coefficients["weight"].values())
    made = load(tmp_path / "out" / "recipe.yaml")
    assert set(made.parameters) == {"factor", "weight"}
    ws.Recipe.load(tmp_path / "out" / "recipe.yaml").run(tmp_path / "merged")
    result = ws.open_source(tmp_path / "merged")
    assert all(torch.equal(result.read(n), p.detach()) for n, p in module.named_parameters())


@pytest.mark.parametrize("how", [PLUS, UNDER], ids=["chunks", "ahead"])
@pytest.mark.parametrize("at", [2, 4])
def test_killed_in_either_part_it_goes_on_to_the_same_bits(tmp_path: Path, how: dict[str, Any], at: int):
    given, seen, all_steps = recipe(tmp_path), list[int](), list[int]()

    def kill(done: int, steps: int, loss: float) -> None:
        seen.append(done)
        if len(seen) == at:
            raise Killed

    whole = go(given, tmp_path / "whole", how, progress=lambda done, *_: all_steps.append(done))
    with pytest.raises(Killed):
        go(given, tmp_path / "out", how, progress=kill)
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    again = go(given, tmp_path / "out", how, resume=True, progress=lambda done, *_: seen.append(done))
    assert seen == all_steps  # what was done is not done again
    for parameter, table in whole.coefficients.items():
        assert all(torch.equal(again.coefficients[parameter][n], v) for n, v in table.items())
    for name in ("recipe.yaml", "coefficients.safetensors", "curve.csv", "first/coefficients.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list((tmp_path / "out").rglob("journal*"))


@pytest.mark.parametrize(
    ("space", "options", "text"),
    [
        (
            "concrete",
            {"inner": "layerwise"},
            r"^preset concrete: inner 'layerwise' is unknown; did you mean",
        ),
        ("expert_merging_pp", {"most": 0}, r"^preset expert_merging_pp: most must be at least 1"),
    ],
)
def test_wrong_options_of_two_parts(tmp_path: Path, space: str, options: dict[str, Any], text: str):
    with pytest.raises(RecipeError, match=text):
        tune(recipe(tmp_path), space, data=TAUGHT, module=fresh(), **options)


# --- objectives ----------------------------------------------------------------------------------


def test_entropy_is_that_of_autograd_and_masked_classes_add_nothing():
    logits = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(entropy(logits), torch.distributions.Categorical(logits=logits).entropy())
    assert torch.autograd.gradcheck(entropy, (logits,))
    masked = torch.cat([logits.detach(), torch.full((3, 5, 2), -torch.inf)], -1).requires_grad_()
    found = entropy(masked)
    torch.testing.assert_close(found, entropy(logits))
    (found.sum()).backward()
    assert masked.grad is not None
    assert bool((masked.grad[..., 7:] == 0).all())
    assert bool(torch.isfinite(masked.grad).all())


def test_forgetting_stops_where_another_task_loses_too_much(tmp_path: Path):
    """The numbers taken have the lowest accuracy of the target among those that keep the others'."""
    how = {"space": "atlas", "data": DATA, "goal": "negation", "target": "t0", "lr": 0.01, "steps": 40}
    validation = {task: list(batches) for task, batches in DATA.items()}
    found = go(recipe(tmp_path), tmp_path / "out", how, validation=validation, every=1, controls=False)
    seen = [(row["validation t0"], row["validation t1"]) for row in found.curve if "validation" in row]
    kept = [target for target, control in seen if control >= 0.95 * seen[0][1]]
    assert found.best is not None
    assert found.best[0] == min(kept) < seen[0][0]
    assert seen[-1][1] < 0.95 * seen[0][1]
    assert re.match(r"stopped at step \d+: the accuracy of t1 fell from", found.stopped)
