"""TALL-masks and consensus against their closed forms, in memory."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kit
import weightsmith
from goldens.encoded import encoded, recipe_of
from kit import texts
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.core.method import registry
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import MemorySource
from weightsmith.ops.masks import pack_bits, unpack_bits
from weightsmith.plan.plan import make_plan

SHAPES = {
    "embed_tokens.weight": (11, 6),  # 66 elements: neither rows nor the whole fill their bytes
    "layers.0.mlp.up_proj.weight": (16, 8),
    "layers.0.conv.weight": (5, 3, 3),
    "norm.weight": (13,),
    "scalar": (),
}

state = partial(kit.state, SHAPES)


def plus(base: dict[str, Tensor], delta: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: base[name] + delta[name] for name in base}


@pytest.fixture(scope="module")
def models() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    base = state(0)
    return base, {f"e{i}": plus(base, state(i + 1, 0.02)) for i in range(4)}


def disjoint() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Expert i changes the entries whose flat index is i modulo 3."""
    base, change = state(0), state(1, 0.1)
    experts = {}
    for i in range(3):
        mine = {n: (torch.arange(t.numel()) % 3 == i).reshape(t.shape) for n, t in base.items()}
        experts[f"e{i}"] = {n: torch.where(mine[n], base[n] + change[n], base[n]) for n in base}
    return base, experts


def within_an_ulp(got: Tensor, want: Tensor, base: Tensor) -> bool:
    """base + (want - base) rounds twice: one unit in the last place of the larger of the two."""
    size = torch.maximum(want.abs(), base.abs())
    return bool(((got - want).abs() <= torch.nextafter(size, torch.tensor(torch.inf)) - size).all())


# --- the sheet's closed forms ----------------------------------------------------------------------


def test_one_expert_is_its_own_mask(models):
    base, experts = models
    one = {"e0": {n: torch.where(t > 0, t, base[n]) for n, t in experts["e0"].items()}}
    made = encoded("tall_masks", base, one)
    for name in base:
        assert torch.equal(made.mask(name, "e0"), one["e0"][name] != base[name])
        assert within_an_ulp(made.rebuilt(name, "e0", base[name]), one["e0"][name], base[name])


def test_disjoint_experts_come_back():
    base, experts = disjoint()
    made = encoded("tall_masks", base, experts)
    for name in base:
        for expert, weights in experts.items():
            assert torch.equal(made.mask(name, expert), weights[name] != base[name]), (name, expert)
            assert within_an_ulp(made.rebuilt(name, expert, base[name]), weights[name], base[name])
    summed = weightsmith.merge(experts, "task_arithmetic", base)
    kept = weightsmith.merge(experts, "consensus", base, k=1, lambda_=1)
    dropped = weightsmith.merge(experts, "consensus", base, k=2, lambda_=1)
    assert all(torch.equal(kept[n], summed[n]) and torch.equal(dropped[n], base[n]) for n in base)
    assert not torch.equal(summed["norm.weight"], base["norm.weight"])


@pytest.mark.parametrize("front", ["task_arithmetic", "ties"])
def test_consensus_of_none_is_the_merge_and_of_too_many_the_base(models, front):
    base, experts = models
    merged = weightsmith.merge(experts, front, base)
    none = weightsmith.merge(experts, [front, {"consensus": {"k": 0, "lambda": 1}}], base)
    many = weightsmith.merge(experts, [front, {"consensus": {"k": 5}}], base)
    some = weightsmith.merge(experts, [front, {"consensus": {"k": 2}}], base)
    for name in base:
        assert torch.equal(none[name], merged[name])
        assert torch.equal(many[name], base[name])
    changed = {n: (m[n] != base[n]).sum() for m in [some] for n in base}
    assert 0 < changed["embed_tokens.weight"] < (merged["embed_tokens.weight"] != base["embed_tokens.weight"]).sum()


def test_stricter_masks_are_part_of_looser_ones(models):
    base, experts = models
    loose, strict = (encoded({"tall_masks": {"lambda": lam}}, base, experts) for lam in (0.3, 0.6))
    sizes = []
    for name in base:
        for expert in experts:
            assert not (strict.mask(name, expert) & ~loose.mask(name, expert)).any()
            sizes.append((int(strict.mask(name, expert).sum()), int(loose.mask(name, expert).sum())))
    assert sum(a for a, _ in sizes) < sum(b for _, b in sizes)


@pytest.mark.parametrize(("strictness", "second"), [(0.499, True), (0.5, False), (0.501, False)])
def test_the_hand_case(strictness, second):
    """Changes 2 and -1, tau 1: |2| > lambda |1 - 2|, and |-1| > lambda |1 + 1| below 0.5; equal is not enough."""
    base = {"w": torch.zeros(1)}
    experts = {"a": {"w": torch.tensor([2.0])}, "b": {"w": torch.tensor([-1.0])}}
    made = encoded({"tall_masks": {"lambda": strictness}}, base, experts)
    assert made.tensors["w::tau"].tolist() == [1.0]
    assert made.mask("w", "a").item() is True
    assert made.mask("w", "b").item() is second
    assert made.rebuilt("w", "b", base["w"]).item() == float(second)


def test_a_lambda_per_expert(models):
    base, experts = models
    mixed = encoded({"tall_masks": {"lambda": {"e1": 0.7}}}, base, experts)
    plain, strict = (encoded({"tall_masks": {"lambda": lam}}, base, experts) for lam in (0.4, 0.7))
    for name in base:
        for expert in experts:
            wanted = strict if expert == "e1" else plain
            assert torch.equal(mixed.mask(name, expert), wanted.mask(name, expert))


def test_masks_compare_with_what_stands_in_front(models):
    base, experts = models
    trimmed = {"ties": {"aggregate": "sum", "density": 0.2, "scope": "global"}}
    made = encoded([trimmed, "tall_masks"], base, experts)
    merged = weightsmith.merge(experts, [trimmed], base)
    for name in base:
        tau = made.tensors[f"{name}::tau"]
        assert torch.equal(base[name] + tau, merged[name])
        delta = experts["e2"][name] - base[name]
        assert torch.equal(made.mask(name, "e2"), delta.abs() > 0.4 * (tau - delta).abs())


# --- packing ---------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=70), st.integers(0, 7))
def test_bits_are_packed_as_numpy_packs_them(bits, skip):
    packed = pack_bits(torch.tensor(bits, dtype=torch.bool))
    assert np.array_equal(packed.numpy(), np.packbits(np.array(bits, dtype=bool)))
    assert unpack_bits(packed, 0, len(bits)).tolist() == bits
    skip = min(skip, len(bits))
    assert unpack_bits(packed, skip, len(bits) - skip).tolist() == bits[skip:]


def test_bits_that_pad_are_zero(models):
    base, experts = models
    whole = encoded("tall_masks", base, experts)
    for name, shape in SHAPES.items():
        packed = whole.tensors[f"{name}::mask.e0"]
        numel = int(np.prod(shape))
        assert packed.shape == (-(-numel // 8),)
        assert not numel % 8 or int(packed[-1]) & (0xFF >> numel % 8) == 0


def test_parts_of_a_tensor_are_tasks_that_meet_on_bytes(models, monkeypatch):
    base, experts = models
    whole = encoded("tall_masks", base, experts)
    monkeypatch.setattr("weightsmith.core.task.PART_BYTES", 100)
    cut = encoded("tall_masks", base, experts)
    assert len(cut.plan.tasks) > len(whole.plan.tasks)
    assert all(torch.equal(cut.tensors[n], t) for n, t in whole.tensors.items())
    assert sum(t.nbytes for t in cut.plan.tasks) == pytest.approx(cut.plan.write_bytes, abs=8 * len(cut.plan.tasks))


# --- what is refused, and what is only said --------------------------------------------------------


def planned(method, base, experts, **how):
    recipe = recipe_of(method, list(experts))
    inputs = Inputs(MemorySource(base, "base"), {n: MemorySource(t, n) for n, t in experts.items()})
    return make_plan(recipe, sources=inputs, strict=True, **how)


@pytest.mark.parametrize("k", [-1, 2.0, 1.5, True])
def test_k_is_a_whole_number(k):
    with pytest.raises(RecipeError, match=r"consensus: k = .* is (outside|no whole number; it takes) \[0, inf\)$"):
        registry("consensus")(k=k)


def test_k_above_the_number_of_experts(models):
    base, experts = models
    with pytest.raises(PlanError, match=r"consensus: k = 6 is outside \[0, 5\] for 4 models"):
        planned({"consensus": {"k": 6}}, base, experts)


def test_one_expert_and_k_2_is_the_base_and_says_so(models):
    base, experts = models
    one = {"e0": experts["e0"]}
    notes = texts(planned("consensus", base, one).warnings)
    assert notes == ["consensus: k = 2 with 1 model selects nothing: the result is the base"]
    assert planned("consensus", base, experts).warnings == ()
    merged = weightsmith.merge(one, "consensus", base)
    assert all(torch.equal(merged[n], base[n]) for n in base)


@pytest.mark.parametrize("method", ["tall_masks", "consensus"])
def test_a_negative_strictness(method):
    field = "lambda_" if method == "tall_masks" else "tall_mask_lambda"
    with pytest.raises(RecipeError, match=r"lambda = -0.1 is outside \[0, inf\)"):
        registry(method)(**{field: -0.1})


def test_lambda_beside_consensus_is_its_own(models):
    """Not that of the task arithmetic which is put in front of it."""
    base, experts = models
    scaled = weightsmith.merge(experts, "consensus", base, lambda_=0.3)
    inline = weightsmith.merge(experts, ["task_arithmetic", {"consensus": {"lambda": 0.3}}], base)
    assert all(torch.equal(scaled[n], inline[n]) for n in base)


def test_merging_with_a_codec_and_compressing_without_one(models):
    base, experts = models
    with pytest.raises(PlanError, match=r"task_arithmetic \| tall_masks keeps every model .* use weightsmith compress"):
        planned("tall_masks", base, experts)
    with pytest.raises(PlanError, match="nothing is compressed: end 'method' with a codec such as tall_masks"):
        planned("ties", base, experts, encode=True)


def test_a_codec_comes_last(models):
    base, experts = models
    with pytest.raises((PlanError, RecipeError), match="tall_masks is a codec; put it last"):
        planned(["task_arithmetic", "tall_masks", "lines"], base, experts, encode=True)


def test_8_bit_bases_keep_a_task_vector_that_can_be_small():
    base = {"w": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    made = encoded("tall_masks", base, {"a": {"w": (torch.ones(4, 4) * 1.125).to(torch.float8_e4m3fn)}})
    assert made.tensors["w::tau"].dtype == torch.bfloat16


def test_masks_of_half_precision_models_are_compared_in_float32():
    """1 > 0.3996 * 2.5 = 0.999, which is no longer true where 0.999 is rounded to bfloat16."""
    one, other = torch.tensor([1.0]).bfloat16(), torch.tensor([2.5]).bfloat16()
    made = encoded({"tall_masks": {"lambda": 0.3996}}, {"w": one * 0}, {"a": {"w": one}, "b": {"w": other}})
    assert made.mask("w", "a").item()
    assert not bool(one > other * 0.3996)
