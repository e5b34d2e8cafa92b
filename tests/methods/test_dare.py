"""DARE: closed forms and statistics."""

from __future__ import annotations

import json

import pytest
import torch
from driver import every, merge, run, sites
from safetensors.torch import save_file

import weightsmith
from weightsmith.core.method import Pipeline
from weightsmith.io.read.source import MemorySource
from weightsmith.methods.dare import Dare
from weightsmith.methods.task_arithmetic import TaskArithmetic

N = 20_000
BASE = {"w": torch.zeros(N // 10, 10)}
CHANGE = torch.randn(N // 10, 10, generator=torch.Generator().manual_seed(1))
EXPERTS = {"a": {"w": CHANGE}, "b": {"w": CHANGE.flip(0)}}


def dropped(seed: int = 0, names: tuple[str, ...] = ("a", "b"), **parameters) -> torch.Tensor:
    """The filtered task vectors."""
    site = sites({n: EXPERTS[n] for n in names}, BASE, seed=seed)["w"]
    return Dare(**parameters).apply(site).deltas


def test_the_share_kept_and_the_independence_of_masks():
    for density in (0.1, 0.5, 0.9):
        kept = dropped(density=density) != 0
        assert (kept.float().mean((1, 2)) - density).abs().max() < 4 * (density * (1 - density) / N) ** 0.5
        both = float((kept[0] & kept[1]).float().mean())
        assert abs(both - density**2) < 4 * (density**2 * (1 - density**2) / N) ** 0.5


def test_survivors_are_divided_by_the_density():
    thinned = dropped(density=0.25)
    raw = torch.stack([CHANGE, CHANGE.flip(0)])
    assert torch.equal(thinned, torch.where(thinned != 0, raw / 0.25, 0.0))
    assert torch.equal(dropped(density=0.25, rescale=False), torch.where(thinned != 0, raw, 0.0))


def test_the_mean_over_seeds_is_the_whole_change():
    seeds = 200
    one = {"a": {"w": CHANGE[:20]}}
    drops = (Dare().apply(sites(one, {"w": BASE["w"][:20]}, seed=seed)["w"]).deltas[0] for seed in range(seeds))
    mean = sum(drops) / seeds
    # A kept entry is 2 delta with probability 1/2, so its standard deviation is |delta|.
    assert ((mean - CHANGE[:20]).abs() <= 4.5 * CHANGE[:20].abs() / seeds**0.5 + 1e-6).all()


def test_masks_belong_to_the_expert_not_to_its_place():
    assert torch.equal(dropped(names=("a", "b"))[1], dropped(names=("b", "a"))[0])
    assert torch.equal(dropped(names=("b",))[0], dropped(names=("a", "b"))[1])
    assert not torch.equal(dropped(seed=1), dropped(seed=2))


def test_the_l1_rule_keeps_each_tensors_norm():
    pipeline = Pipeline((Dare(density=(0.1, 0.6), rescale_rule="l1"), TaskArithmetic(weight=(1.0, 0.0))))
    out = run(pipeline, sites(EXPERTS, BASE), every(77))["w"]
    assert float(out.double().abs().sum()) == pytest.approx(float(CHANGE.double().abs().sum()), rel=1e-5)
    quiet = {"a": {"w": torch.full((2, 2), 1e-9)}}  # sums below 1e-7 are not matched
    site = sites(quiet, {"w": torch.zeros(2, 2)})
    out = run(Pipeline((Dare(rescale_rule="l1"), TaskArithmetic())), site)["w"]
    assert set(out.unique().tolist()) <= {0.0, float(torch.tensor(1e-9))}


def test_density_one_is_the_plain_merger():
    for rule in ("expectation", "l1"):
        got = merge(EXPERTS, [Dare(density=1.0, rescale_rule=rule), "task_arithmetic"], base=BASE)["w"]
        assert torch.equal(got, merge(EXPERTS, "task_arithmetic", base=BASE)["w"])


def test_tied_tensors_get_one_mask():
    tied = {"embed_tokens.weight": CHANGE[:30], "lm_head.weight": CHANGE[:30]}
    ground = torch.zeros(30, 10)
    merged = weightsmith.merge({"a": tied}, [Dare()], dict.fromkeys(tied, ground))
    assert torch.equal(merged["embed_tokens.weight"], merged["lm_head.weight"])
    assert 0 < int((merged["lm_head.weight"] == 0).sum()) < 300
    apart = {n: t.clone() for n, t in tied.items()}
    other = weightsmith.merge({"a": apart}, [Dare()], {n: ground.clone() for n in tied})
    assert not torch.equal(other["embed_tokens.weight"], other["lm_head.weight"])


def test_an_adapter_is_thinned_as_the_change_that_it_makes(tmp_path):
    """Not its factors by themselves, which is another method."""
    made = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 10, generator=made), torch.randn(30, 2, generator=made)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["m"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    names = {"lora_A": a, "lora_B": b}
    save_file({f"base_model.model.m.{n}.weight": t for n, t in names.items()}, tmp_path / "adapter_model.safetensors")
    base = MemorySource({"m.weight": torch.zeros(30, 10)})
    merged = weightsmith.merge({"a": tmp_path}, [Dare(density=0.5)], base)["m.weight"]
    want = weightsmith.merge({"a": {"m.weight": b @ a}}, [Dare(density=0.5)], base)["m.weight"]
    assert torch.allclose(merged, want, atol=1e-6)
    assert 100 < int((merged == 0).sum()) < 200
