"""CUDA against the CPU.  Collected by `make gpu` alone, which ends with one line where there is no GPU.

Tolerance, relative to the merged change (Frobenius norm): 2e-6 for methods of elements, 3e-4 for those that decompose
matrices.  Which weights a method drops or selects is the same everywhere.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightsmith
from kit import count_for, noise
from matrix import CODECS, given, models, planned
from run.test_device import NAMES, recipe, tensors
from test_conformance import STAGES, pipeline, statistics, variants
from weightsmith.core.method import BASE, Grain, Stage, registered
from weightsmith.devices.accelerator import Accelerator, accelerator_of
from weightsmith.engine.carry import carry_out
from weightsmith.io.read.source import MemorySource
from weightsmith.io.write.sink import MemorySink
from weightsmith.jobs.merge import run
from weightsmith.jobs.nested import open_inputs
from weightsmith.jobs.verify import rerun
from weightsmith.plan.plan import make_plan

if not torch.cuda.is_available():
    pytest.exit(f"no GPU: torch {torch.__version__} sees no CUDA device, so nothing was compared", returncode=2)

CUDA: str | Accelerator = "cuda"
ELEMENT, WHOLE = 2e-6, 3e-4
SHAPES = {"model.embed_tokens.weight": (600, 40), "model.layers.0.norm.weight": (70,), "scalar": (),
          "model.layers.1.mlp.up_proj.weight": (300, 280), "model.layers.2.mlp.up_proj.weight": (48, 96)}  # fmt: skip
DROPS = ("dare", "della", "magnitude", "breadcrumbs", "ties", "consensus", "emr")
"""Methods whose change is zero where they drop a weight."""

every_variant = pytest.mark.parametrize(
    "stage", [pytest.param(s, id=repr(s)) for cls in STAGES.values() for s in variants(cls)]
)


@every_variant
def test_methods_agree_with_the_cpu(stage: Stage) -> None:
    base = {n: noise(*s, seed=i) for i, (n, s) in enumerate(SHAPES.items())}
    experts = {
        f"e{j}": {n: b + 0.1 * noise(*b.shape, seed=10 * j + i + 50) for i, (n, b) in enumerate(base.items())}
        for j in range(count_for(stage))
    }
    if any(p.name == "iters" for p in stage.parameters()):
        stage = dataclasses.replace(stage, iters=5)
    stats = statistics(stage, experts) if set(stage.traits.needs) - {BASE} else None
    expected = weightsmith.merge(experts, pipeline(stage), base=base, stats=stats)
    got = weightsmith.merge(experts, pipeline(stage), base=base, stats=stats, device=CUDA)  # type: ignore[arg-type]
    share = ELEMENT if stage.grain is Grain.ELEMENT else WHOLE
    for name, ground in base.items():
        assert got[name].device.type == "cpu"
        assert apart(got[name], expected[name], ground) <= share, name
        if stage.name in DROPS:
            assert torch.equal(got[name] == ground, expected[name] == ground), name


def apart(got: Tensor, expected: Tensor, ground: Tensor) -> float:
    change = float((expected - ground).norm()) or float(ground.norm()) or 1.0
    return float((got - expected).norm()) / change


@pytest.mark.parametrize("name", sorted(set(registered()) - set(STAGES)))
def test_codecs_and_groups_agree_with_the_cpu(name: str) -> None:
    plain, inputs = given(name, {n: MemorySource(found, n) for n, found in models().items()})
    here, there = MemorySink(), MemorySink()
    carry_out(planned(name, plain, inputs), inputs, here)
    carry_out(make_plan(plain, sources=inputs, encode=name in CODECS, device=CUDA), inputs, there)
    expected, got = here.tensors(), there.tensors()
    assert list(got) == list(expected)
    for part, value in expected.items():
        if not value.is_floating_point():  # masks, signs, places
            assert torch.equal(got[part], value), part
        elif not part.rpartition("::")[2].startswith(("u", "v", "s.")):  # directions have no sign of their own
            assert apart(got[part].float(), value.float(), torch.zeros_like(value).float()) <= 1e-2, part  # bfloat16


def test_folders_agree_and_can_be_verified_and_memory_is_bounded(tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        large = {
            f"model.layers.{i}.mlp.down_proj.weight": noise(1024, 1024, seed=10 * seed + i).bfloat16() for i in (0, 1)
        }
        save_file({**tensors(seed), **large}, tmp_path / name / "model.safetensors")
    wanted = recipe(tmp_path, "rules: [{layers: [0, 3], method: tsvm}]\nmethod: ties")
    plan = make_plan(wanted, sources=open_inputs(wanted), device=CUDA)
    assert plan.fit is not None
    near = load_file(run(wanted, tmp_path / "near").out / "model.safetensors")
    torch.cuda.reset_peak_memory_stats()
    out = run(wanted, tmp_path / "far", device=CUDA).out
    assert torch.cuda.max_memory_allocated() <= plan.fit.device_bytes
    far = load_file(out / "model.safetensors")
    assert far.keys() == near.keys()
    for name, value in near.items():
        assert far[name].dtype == value.dtype
        assert apart(far[name].double(), value.double(), torch.zeros_like(value).double()) <= 1e-3, name
    assert rerun(out) == []


def test_a_small_share_of_the_memory_is_enough(tmp_path: Path) -> None:
    base, *experts = ({"w": noise(2000, 1500, seed=seed)} for seed in range(3))
    expected = weightsmith.merge(experts, "ties", base=base)["w"]
    torch.cuda.set_per_process_memory_fraction(1.5e8 / torch.cuda.mem_get_info()[1])
    try:
        got = weightsmith.merge(experts, "ties", base=base, device=CUDA)["w"]  # type: ignore[arg-type]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert apart(got, expected, base["w"]) <= ELEMENT


def test_the_accelerator_itself() -> None:
    accelerator = accelerator_of("cuda:0")
    assert accelerator is not None
    staged, device = accelerator.staging(1 << 20), "cuda:0"
    assert staged.is_pinned()
    value = torch.arange(1 << 18, dtype=torch.float32)
    staged.view(torch.float32).copy_(value)
    with accelerator.using(device, accelerator.stream(device)):
        there = torch.empty(1 << 18, device=device)
        accelerator.copy_in(there, staged.view(torch.float32))
        accelerator.wait(accelerator.mark())
        staged.zero_()
        accelerator.copy_out(staged.view(torch.float32), there + 1)
        accelerator.wait(accelerator.mark())
    assert torch.equal(staged.view(torch.float32), value + 1)
    free = accelerator.free(device)
    assert free is not None
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(2 * free, dtype=torch.uint8, device=device)
    assert accelerator.ran_out(error.value)
    accelerator.settle(device)
