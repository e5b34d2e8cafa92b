"""Every method on a device that is the CPU in disguise: no tensor in the wrong place, and the CPU's bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import weightsmith
from kit import count_for, noise
from matrix import CODECS, given, models, planned
from run.disguise import DEVICE, Disguise, Disguised
from test_conformance import STAGES, pipeline, statistics, variants
from weightsmith.core.method import BASE, Filter, Grain, Method, Stage, registered
from weightsmith.engine.carry import carry_out
from weightsmith.io.read.source import MemorySource
from weightsmith.io.write.sink import MemorySink
from weightsmith.ops import spectral
from weightsmith.plan.plan import make_plan

SMALL = {
    "model.embed_tokens.weight": (6, 5),
    "model.layers.0.norm.weight": (7,),
    "model.layers.1.up_proj.weight": (5, 4),
}
LARGE = {"model.layers.0.mlp.up_proj.weight": (300, 280)}
"""From 256 on spectral methods take other ways."""

WHOLE = {n: cls for n, cls in STAGES.items() if cls.grain is Grain.TENSOR}


@pytest.fixture(autouse=True)
def _decomposed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU: a device would take polar factors by products, to another rounding."""
    if "by_products" not in request.node.name:
        monkeypatch.setattr("weightsmith.ops.spectral.on_accelerator", lambda _: False)


def check(stage: Stage, shapes: dict[str, tuple[int, ...]]) -> None:
    base = {n: noise(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    experts = {
        f"e{j}": {n: b + 0.1 * noise(*b.shape, seed=10 * j + i + 50) for i, (n, b) in enumerate(base.items())}
        for j in range(count_for(stage))
    }
    if any(p.name == "iters" for p in stage.parameters()):
        stage = dataclasses.replace(stage, iters=2)
    stats = statistics(stage, experts) if set(stage.traits.needs) - {BASE} else None
    expected = weightsmith.merge(experts, pipeline(stage), base=base, stats=stats)
    got = weightsmith.merge(experts, pipeline(stage), base=base, stats=stats, device=Disguise())
    assert [n for n in expected if not torch.equal(got[n], expected[n])] == []


@pytest.mark.parametrize("stage", [pytest.param(s, id=repr(s)) for cls in STAGES.values() for s in variants(cls)])
def test_methods_make_their_tensors_where_the_models_are(stage: Stage) -> None:
    check(stage, SMALL)


@pytest.mark.parametrize("cls", [pytest.param(cls, id=n) for n, cls in WHOLE.items()])
def test_the_ways_for_large_matrices_too(cls: type[Stage]) -> None:
    check(next(variants(cls)), LARGE)


@pytest.mark.parametrize("name", ["tsvm", "r_tsvm", "iso_c", "iso_cts"])
def test_polar_factors_by_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    plain = spectral.polar_by_products
    monkeypatch.setattr(spectral, "polar_by_products", lambda x: [plain(x), found.append(True)][0])
    for side in (40, 300):
        key = f"layers.0.mlp.up_proj.{side}"
        base, *experts = ({key: noise(side, side - 20, seed=seed)} for seed in range(4))
        expected = weightsmith.merge(experts, name, base=base)[key] - base[key]
        assert not found
        got = weightsmith.merge(experts, name, base=base, device=Disguise())[key] - base[key]
        assert float((got - expected).norm() / expected.norm()) < 1e-4  # those of the CPU are made in float32
        assert bool(found) == (name != "iso_c" or side > 256)
        found.clear()


@pytest.mark.parametrize("name", sorted(set(registered()) - set(STAGES)))
def test_codecs_and_groups(name: str) -> None:
    recipe, inputs = given(name, {n: MemorySource(tensors, n) for n, tensors in models().items()})
    here, there = MemorySink(), MemorySink()
    carry_out(planned(name, recipe, inputs), inputs, here)
    carry_out(make_plan(recipe, sources=inputs, encode=name in CODECS, device=Disguise(count=2)), inputs, there)
    expected, got = here.tensors(), there.tensors()
    assert list(got) == list(expected)
    assert [n for n in expected if not torch.equal(got[n], expected[n])] == []


def test_nothing_registered_is_left_out() -> None:
    rest = set(registered()) - set(STAGES)
    assert {n for n in rest if issubclass(registered()[n], (Filter, Method))} == {"weight_matching"}


def test_the_disguise_is_as_strict_as_a_device() -> None:
    here, accelerator = torch.ones(3), Disguise()
    with accelerator.using(DEVICE, None):
        there = torch.ones(3, device=DEVICE)
        assert isinstance(there, Disguised)
        assert there.device.type == "lazy"
        assert isinstance(torch.tensor([1.0], device=DEVICE), Disguised)
        for mixture in (
            lambda: there + here,
            lambda: torch.stack([there, here]),
            lambda: here @ there,
            lambda: here[there > 0],
        ):
            with pytest.raises(RuntimeError, match="expected all tensors to be on"):
                mixture()
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert float((there + torch.tensor(1.0)).sum()) == 6
        assert there[torch.tensor([0, 2])].tolist() == [1, 1]
        view = there[1:]
        view.mul_(5)
        assert there.cpu().tolist() == [1, 5, 5]
        assert type(there.cpu()) is torch.Tensor
        assert type(torch.ones(2)) is torch.Tensor
        assert type(torch.zeros_like(there)) is Disguised
