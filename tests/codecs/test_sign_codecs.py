"""bitdelta and randes against their closed forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import kit
from goldens.encoded import encoded
from weightsmith.codecs.randes import signs
from weightsmith.ops.noise import uniform_bits

SHAPES = {"embed_tokens.weight": (300, 301), "layers.0.conv.weight": (5, 3, 3), "norm.weight": (13,), "scalar": ()}

state = partial(kit.state, SHAPES)


BASE = state(0, 1.0)
EXPERTS = {f"e{i}": {n: BASE[n] + d for n, d in state(i + 1, 0.02 * (i + 1)).items()} for i in range(3)}
DELTAS = {e: {n: m[n] - BASE[n] for n in BASE} for e, m in EXPERTS.items()}


def test_bitdelta_is_the_sign_times_the_mean_size():
    made = encoded("bitdelta", BASE, EXPERTS)
    for expert, deltas in DELTAS.items():
        for name, delta in deltas.items():
            got = made.rebuilt(name, expert, BASE[name])
            if delta.ndim < 2:
                assert torch.equal(got, EXPERTS[expert][name])
                continue
            size = delta.double().abs().mean().float()
            assert torch.allclose(got, BASE[name] + torch.where(delta > 0, size, -size), atol=1e-7)
            lost = (got - EXPERTS[expert][name]).double().square().sum()
            for other in (0.9 * size, 1.1 * size):
                assert float(lost) < float((delta - torch.where(delta > 0, other, -other)).double().square().sum())


def test_an_expert_that_is_the_base_comes_back():
    made = encoded("bitdelta", BASE, {"same": BASE, "e1": EXPERTS["e1"]})
    assert all(torch.equal(made.rebuilt(n, "same", BASE[n]), BASE[n]) for n in BASE)


def test_randes_is_the_signed_sum_under_the_signs():
    made = encoded("randes", BASE, EXPERTS)
    for name, base in BASE.items():
        drawn = {e: int(uniform_bits(0, name, e, "randes", 0, 1)[0]) for e in EXPERTS}
        patterns = {e: signs(number, 0, base) for e, number in drawn.items()}
        total = sum(patterns[e] * DELTAS[e][name] for e in EXPERTS)
        assert torch.allclose(made.tensors[f"{name}::sum"], total, atol=1e-6)
        for expert in EXPERTS:
            assert torch.allclose(made.rebuilt(name, expert, base), base + patterns[expert] * total, atol=1e-6)


def test_randes_gives_one_expert_back_and_turns_others_into_fair_noise():
    alone = encoded("randes", BASE, {"e0": EXPERTS["e0"]})
    assert all(torch.allclose(alone.rebuilt(n, "e0", BASE[n]), EXPERTS["e0"][n], atol=1e-6) for n in BASE)
    name = "embed_tokens.weight"
    made = encoded("randes", BASE, EXPERTS)
    noise = made.rebuilt(name, "e0", BASE[name]) - EXPERTS["e0"][name]
    others = sum(DELTAS[e][name].double().square().sum() for e in ("e1", "e2"))
    assert float(noise.double().square().sum() / others) == pytest.approx(1, rel=0.02)
    assert abs(float((noise * DELTAS["e1"][name]).sum() / DELTAS["e1"][name].square().sum())) < 0.02
