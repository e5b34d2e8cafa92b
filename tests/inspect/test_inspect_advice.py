"""Every rule holds where it says, and what follows names methods that exist."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from inspected import of, of_vectors

from weightsmith.core.method import registry
from weightsmith.inspect.advice import RULES, Rule

MODEL = of_vectors([9.0, 9.0, 9.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.1, 0.0, 1.0]).model
EXPERTS = ("math", "code", "chat")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.condition)
def test_a_rule_holds_within_its_bounds_only(rule: Rule) -> None:
    inside = rule.above if rule.above > -math.inf else rule.below - 1e-6
    here = replace(rule, figure=lambda _: inside)
    assert here.holds(MODEL)
    found = here.on(MODEL, EXPERTS)
    assert found.text.startswith(f"{rule.name} = ")
    assert "{" not in found.text
    assert found.source.startswith(("heuristic", "published", "measured"))
    for outside in (rule.below, math.nextafter(rule.above, -math.inf), None):
        if outside is None or math.isfinite(outside):
            assert not replace(rule, figure=lambda _, v=outside: v).holds(MODEL)
    for name in rule.methods:
        assert registry(name).traits.name == name


def said(*words: str, model: object) -> bool:
    return any(all(word in advice.text for word in words) for advice in model.advice)  # type: ignore[attr-defined]


def test_near_orthogonal_experts() -> None:
    eye = 0.1 * torch.eye(4)
    found = of({"w": torch.full((4, 4), 5.0)}, [{"w": eye[[i] * 4]} for i in range(4)])
    assert said("mean |cos| = 0 < 0.1", "lambda from 0.25 (the mean) to 0.5 (a sum as long as one", model=found)
    assert said("largest |tau|/|base| = 1% < 5%", "near the base", model=found)
    assert said("singular interference / by chance = 0x < 1.2x", model=found)


def test_opposed_far_and_unequal_experts() -> None:
    found = of_vectors([1.0] * 4, [1.0, 1.0, 1.0, 1.0], [-4.0, -4.0, -4.0, -4.0], [1.0, -1.0, 1.0, -1.0])
    assert said("largest |tau|/|base| = 400% >= 5%", "b moved far", model=found)
    assert said("largest / smallest |tau| = 4x >= 2x", "b drowns a", model=found)
    assert said("smallest cos = -1 < -0.1", "a and b pull against each other", model=found)
    assert said("largest |cos(tau, base)| = 1 >= 0.5", model=found)
    assert said("outvoted weight mass = 27.8% >= 20%", "ties", model=found) is False
    assert said("outvoted weight mass", "ties elects", model=found)


CONFLICT, AGREE = "outvoted weight mass / by chance >= 1.3x", "outvoted weight mass / by chance < 0.7x"
LARGE = "outvoted weight mass >= 20%"
NEAR, SHARED, SAME, APART = "mean |cos| < 0.1", "0.1 <= mean cos < 0.5", "mean cos >= 0.5", "smallest cos < -0.1"
UNEQUAL = "largest / smallest |tau| >= 2x"


@pytest.mark.parametrize(
    ("common", "scales", "wanted"),
    [
        (0.0, (1.0, 1.0), {NEAR}),
        (0.0, (1.0, 3.3), {NEAR, UNEQUAL}),
        (0.0, (1.0,) * 8, {NEAR, LARGE}),
        (2.0, (1.0, 1.0), {SAME, AGREE}),
        (2.0, (1.0, 3.3), {SAME, AGREE, UNEQUAL}),
        (2.0, (1.0,) * 8, {SAME, AGREE}),
        (-2.0, (1.0, 1.0), {APART, CONFLICT, LARGE}),
        (-2.0, (1.0, 3.3), {APART, CONFLICT, LARGE, UNEQUAL}),
        (0.45, (1.0, 1.0), {SHARED}),
    ],
)  # fmt: skip
def test_independent_agreeing_and_conflicting(common: float, scales: tuple[float, ...], wanted: set[str]) -> None:
    """Task vectors of a common part and one of their own; a negative common part turns from expert to expert."""
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(200, 100, generator=generator)
    signs = [1.0 if common > 0 or i % 2 else -1.0 for i in range(len(scales))]
    parts = [sign * abs(common) * shared + torch.randn(200, 100, generator=generator) for sign in signs]
    deltas = [{"w": scale * part} for scale, part in zip(scales, parts, strict=True)]
    found = of({"w": torch.full((200, 100), 1e4)}, deltas, spectra=0)
    assert {advice.rule for advice in found.advice} & {CONFLICT, AGREE, LARGE, NEAR, SHARED, SAME, APART, UNEQUAL} == (
        wanted
    )


def test_what_only_embeddings_do_is_not_said_of_the_model() -> None:
    """Both experts changed the same rows of a table much larger than the blocks, which have nothing in common."""
    generator = torch.Generator().manual_seed(1)
    table, block = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"

    def delta() -> dict[str, torch.Tensor]:
        rows = torch.randn(200, 20, generator=generator) * (torch.arange(200) < 30)[:, None]
        return {table: rows, block: 0.5 * torch.randn(20, 20, generator=generator)}

    base = {table: torch.full((200, 20), 1e3), block: torch.full((20, 20), 1e3)}
    found = of(base, [delta(), delta()], spectra=0)
    alone = of({block: base[block]}, [{block: d[block]} for d in (delta(), delta())], spectra=0)
    assert any("experts want the same weights" in advice.text for advice in of(
        {table: base[table]}, [{table: delta()[table]} for _ in "ab"], spectra=0).advice)  # fmt: skip
    overlap = [advice for advice in found.advice if advice.rule.endswith("mean overlap of top-20% masks < 0.2")]
    assert len(overlap) == 1
    assert overlap[0].text.startswith("mean overlap of top-20% masks without embeddings and output layer = 0.1")
    assert not said("want the same weights", model=found)
    unchanged = [advice for advice in found.advice if advice.rule == "mean share of unchanged weights >= 50%"]
    assert unchanged[0].text == (
        "mean share of unchanged weights = 77.3% >= 50%: but 0% without embeddings and output layer, so it says little "
        "of the other tensors"
    )
    assert unchanged[0].methods == ()
    assert not said("without embeddings", model=alone)


def test_a_middle_cosine_has_both_bounds() -> None:
    found = of_vectors([9.0, 9.0], [1.0, 0.0], [0.3, 0.953939])
    assert said("mean cos = 0.3 >= 0.1 and < 0.5", "iso_c", model=found)
    (rule,) = [a.rule for a in found.advice if "cos <" in a.rule]
    assert rule == "0.1 <= mean cos < 0.5"


def test_peaks_and_sparse_changes() -> None:
    delta = torch.zeros(1000)
    delta[5] = 1e-3
    found = of({"w": torch.ones(1000)}, [{"w": delta}, {"w": -delta}])
    assert said("mean share of |tau|^2 in the top 0.1% = 100% >= 10%", "breadcrumbs", model=found)
    assert said("mean share of unchanged weights = 99.9% >= 50%", model=found)
    assert said("largest mean |tau_i| where changed = 0.001 < 0.002", "dare", model=found)
    assert said("mean overlap of top-20% masks = 1 >= 0.4", model=found)


def test_shared_singular_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(30, 2, generator=generator), torch.randn(2, 30, generator=generator)
    deltas = [{"w": left @ right + 0.01 * torch.randn(30, 30, generator=generator)} for _ in range(3)]
    found = of({"w": torch.full((30, 30), 90.0)}, deltas)
    assert said("singular interference / by chance", ">= 1.5x", "tsvm", model=found)
    assert said("|tau|^2 kept by 1/n of the rank = 100% >= 90%", model=found)


def test_an_expert_that_is_the_base_is_named() -> None:
    found = of_vectors([1.0, 2.0], [1.0, 0.5], [0.0, 0.0])
    assert said("experts equal to the base = 1", "the task vector of b is zero", model=found)
    nothing = of_vectors([1.0, 2.0], [0.0, 0.0], [0.0, 0.0])
    (only,) = nothing.advice  # no word on how well they go together
    assert "the task vector of a, b is zero" in only.text
    assert not said("equal to the base", model=of_vectors([1.0, 2.0], [1.0, 0.5], [0.0, 0.1]))
