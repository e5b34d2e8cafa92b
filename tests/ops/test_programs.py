"""Pipelines that the kernels carry out in one pass give the bytes that torch gives, end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_fused import DTYPES, random_bits
from torch import Tensor

import weightsmith
from weightsmith.core.checks import Count
from weightsmith.core.errors import NumericError
from weightsmith.core.kernel import Look, Masses, Mix, Products, Program
from weightsmith.core.keys import Key
from weightsmith.core.method import Pipeline, registry
from weightsmith.core.pass_ import Pass, Rows, fold, measured
from weightsmith.core.site import Site
from weightsmith.io.read.source import bits_to_tensor
from weightsmith.kernels.job import Job
from weightsmith.kernels.looks import Sight, backends
from weightsmith.kernels.merge import Merge
from weightsmith.kernels.record import STRIP
from weightsmith.kernels.stored import WRITTEN, Stored, dots
from weightsmith.methods.karcher import Karcher
from weightsmith.methods.task_arithmetic import TaskArithmetic
from weightsmith.ops import noise
from weightsmith.ops.reduce import row_products, row_sizes, row_squares, row_sums
from weightsmith.ops.rescale import l1_sums
from weightsmith.ops.select import Cuts

State = dict[str, Tensor]
WIDE = STRIP + 77
SHAPES: Mapping[str, tuple[int, ...]] = {
    "scale": (), "bias": (37,), "empty": (0, 4), "odd": (13, 7, 3), "long": (3, WIDE), "tall": (700, 9),
}  # fmt: skip

PIPELINES: Mapping[str, Any] = {
    "dare": "dare",
    "dare at 1": {"dare": {"density": 1.0}},
    "dare, one density each": {"dare": {"density": [0.1, 0.9, 0.5]}},
    "dare without rescaling": {"dare": {"density": 0.3, "rescale": False}},
    "dare, l1": {"dare": {"density": 0.3, "rescale_rule": "l1"}},
    "dare, ties": [{"dare": {"density": 0.4}}, {"ties": {"density": 1.0}}],
    "dare, l1, ties per tensor": [
        {"dare": {"density": 0.4, "rescale_rule": "l1"}}, {"ties": {"density": 1.0, "scope": "tensor"}},
    ],
    "dare, ties as in mergekit": [
        {"dare": {"density": 0.4, "rescale_rule": "l1"}},
        {"ties": {"density": 1.0, "aggregate": "sum", "zero_sign": "plus", "scope": "tensor"}},
    ],
    "dare, consensus": [{"dare": {"density": 0.7}}, {"task_arithmetic": {"lambda": 0.8}}, "consensus"],
    "breadcrumbs": {"breadcrumbs": {"density": 0.6, "remove_top": 0.1}},
    "breadcrumbs, nothing from the top": {"breadcrumbs": {"density": 0.6, "remove_top": 0.0}},
    "breadcrumbs, all": {"breadcrumbs": {"density": 1.0}},
    "breadcrumbs rescaled": {"breadcrumbs": {"density": [0.2, 0.5, 0.9], "remove_top": 0.05, "rescale": True}},
    "breadcrumbs, ties": [{"breadcrumbs": {"density": 0.6}}, {"ties": {"density": 1.0, "zero_sign": "minority"}}],
    "dare, ties that trim": [{"dare": {"density": [0.3, 1.0, 0.6]}}, {"ties": {"density": 0.3}}],
    "dare, l1, ties that trim per tensor": [
        {"dare": {"density": 0.4, "rescale_rule": "l1"}}, {"ties": {"density": 0.2, "scope": "tensor"}},
    ],
    "dare, magnitude": [{"dare": {"density": 0.7}}, {"magnitude": {"density": 0.3}}],
    "magnitude, dare": [{"magnitude": {"density": 0.6, "rescale": True}}, "dare"],
    "magnitude twice": [{"magnitude": {"density": 0.7}}, {"magnitude": {"density": 0.7, "rescale": True}}],
    "breadcrumbs, ties that trim": [{"breadcrumbs": {"density": 0.7}}, {"ties": {"density": 0.4, "scope": "tensor"}}],
    "della": "della",
    "della without rescaling": {"della": {"density": [0.5, 1.0, 0.3], "epsilon": [0.4, 0.1, 0.0], "rescale": False}},
    "della, ties": ["della", {"ties": {"density": 1.0}}],
    "della, ties that trim": [{"della": {"density": 0.6}}, {"ties": {"density": 0.3}}],
    "della, ties that trim per tensor": [{"della": {"epsilon": 0.3}}, {"ties": {"density": 0.3, "scope": "tensor"}}],
    "magnitude, della, dare, ties, consensus": [
        {"magnitude": {"density": 0.9}}, "della", {"dare": {"density": 0.9}}, {"ties": {"density": 0.5}}, "consensus",
    ],
    "agree": ["agree", "task_arithmetic"],
    "agree per tensor": [{"agree": {"density": [0.3, 1.0, 0.6], "scope": "tensor"}}, "task_arithmetic"],
    "agree, ties": [{"agree": {"density": 0.5}}, {"ties": {"density": 0.3}}],
    "della, agree of all, dare, ties": ["della", {"agree": {"density": 1.0}}, "dare", {"ties": {"density": 0.5}}],
    "as long as an expert": {"task_arithmetic": {"lambda": "auto", "weight": -0.7}},
    "ties as long as an expert": {"ties": {"lambda": "auto", "density": 0.4, "weight": [0.3, 1.0, 0.5]}},
    "dare, as long as an expert": [{"dare": {"density": 0.3}}, {"task_arithmetic": {"lambda": "auto"}}],
    "dare, ties as long as an expert, consensus": [
        {"dare": {"density": 0.6}}, {"ties": {"lambda": "auto", "scope": "tensor"}}, "consensus",
    ],
    "magnitude": {"magnitude": {"density": 0.3}},
    "magnitude rescaled": {"magnitude": {"density": 0.3, "rescale": True}},
    "consensus": {"consensus": {"k": 2, "lambda": 0.4}},
    "consensus of one": {"consensus": {"k": 1}},
    "consensus, nothing agrees": {"consensus": {"k": 4}},
    "consensus of ties": [{"ties": {"density": 0.5}}, {"consensus": {"k": 2, "tall_mask_lambda": [0.2, 0.4, 0.8]}}],
    "consensus of ties per tensor": [{"ties": {"density": 0.5, "scope": "tensor"}}, "consensus"],
}  # fmt: skip


def models(count: int, dtype: str, kind: str) -> list[State]:
    """A base and experts near it; 'coarse': many equal and many zero changes."""
    draw = torch.Generator().manual_seed(count)
    base = {n: torch.randn(s, generator=draw) for n, s in SHAPES.items()}
    out = [base]
    for _ in range(count):
        step = {n: torch.randn(s, generator=draw) for n, s in SHAPES.items()}
        if kind == "coarse":
            step = {n: (d * 2).round() for n, d in step.items()}
        out.append({n: base[n] + 0.25 * step[n] for n in SHAPES})
    return [{n: t.to(getattr(torch, dtype)) for n, t in m.items()} for m in out]


def merged(base: State | None, experts: list[State], method: Any, **more: Any) -> State:
    names = {f"e{i}": m for i, m in enumerate(experts)}
    return weightsmith.merge(names, method, base=base, seed=3, **more)  # type: ignore[return-value]


def bits(state: State) -> dict[str, bytes]:
    return {n: t.float().numpy().tobytes() for n, t in state.items()}


@pytest.mark.parametrize("kind", ["smooth", "coarse"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", PIPELINES)
def test_kernels_equal_torch(name: str, dtype: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *experts = models(3, dtype, kind)
    if dtype == "float32":
        base, *experts = ({n: t for n, t in m.items() if t.ndim} for m in (base, *experts))
    monkeypatch.setattr("weightsmith.core.task.BLOCK", 1 << 14)  # several blocks per tensor
    by_kernels = merged(base, experts, PIPELINES[name])
    monkeypatch.setenv("WEIGHTSMITH_KERNELS", "0")
    by_torch = merged(base, experts, PIPELINES[name])
    for tensor, want in by_torch.items():
        got = by_kernels[tensor]
        assert torch.equal(got, want), f"{tensor}: {int((got != want).sum())} of {got.numel()} entries differ"


@pytest.mark.parametrize("density", [0.3, 0.5, 1e-5, 0.99999])
def test_drops_are_decided_by_all_32_bits(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the upper 16 bits of a number equal the limit's, the kernels look at the lower ones too."""
    size, below = 700 * 900, int(noise.limit(density))
    upper = noise._numbers(noise.stream(3, "w", "e0", "dare"), 0, "<u2", 0, size)
    lower = noise._numbers(noise.stream(3, "w", "e0", "dare"), 1, "<u2", 0, size)
    near = upper == below >> 16
    assert near.any()
    kept = (upper < below >> 16) | (near & (lower < below % 2**16))
    base, expert = {"w": torch.zeros(700, 900)}, {"w": torch.ones(700, 900)}
    found = merged(base, [expert], {"dare": {"density": density, "rescale": False}})["w"]
    assert np.array_equal(found.numpy().reshape(-1) != 0, kept)
    monkeypatch.setenv("WEIGHTSMITH_KERNELS", "0")
    assert torch.equal(merged(base, [expert], {"dare": {"density": density, "rescale": False}})["w"], found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_among_many_sizes_that_hardly_differ(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is sorted where its sizes, or most of them, share a counter; equals go by index."""
    draw = torch.Generator().manual_seed(0)
    close = 1 + torch.randint(0, 3000, (3, 4096), generator=draw) * 2.0**-23
    close[1, ::3], close[2] = 0.0, torch.randint(1, 5, (4096,), generator=draw).float()
    signs = torch.randint(0, 2, close.shape, generator=draw) * 2.0 - 1
    expert = {"w": (close * signs).to(getattr(torch, dtype)), "v": (close[0] * signs[0]).to(getattr(torch, dtype))}
    base = {name: torch.zeros_like(value) for name, value in expert.items()}
    how = {"della": {"density": 0.5, "epsilon": 0.45, "rescale": False}}
    found = merged(base, [expert, expert], how)
    monkeypatch.setenv("WEIGHTSMITH_KERNELS", "0")
    assert bits(merged(base, [expert, expert], how)) == bits(found)


def pipeline_of(name: str) -> Pipeline:
    """As a recipe makes it: what combines is added where there is nothing but filters."""
    stages = PIPELINES[name] if isinstance(PIPELINES[name], list) else [PIPELINES[name]]
    values = []
    for stage in stages:
        ((method, given),) = stage.items() if isinstance(stage, dict) else [(stage, {})]
        fields = {p.name: p.field for p in registry(method).parameters()}
        values.append(registry(method)(**{fields[k]: v for k, v in given.items()}))
    if not any(v.name in ("ties", "task_arithmetic") for v in values):
        place = 0 if values[0].name == "consensus" else len(values)
        values.insert(place, registry("task_arithmetic")())
    return Pipeline(tuple(values))


@pytest.mark.parametrize("name", PIPELINES)
def test_the_kernels_know_these(name: str) -> None:
    """So that the comparison above compares something."""
    assert isinstance(pipeline_of(name).fused(3), Program)


def found_by_torch(pipeline: Pipeline, site: Site) -> dict[int, dict[Pass[Any], Any]]:
    """What every stage measures over a tensor in one block."""
    found: dict[int, dict[Pass[Any], Any]] = {}
    for index, stage in enumerate(pipeline.stages):
        found[index] = {}
        for asked in stage.passes(site.count):
            if asked.applies(site.key):
                look = lambda one, i=index: fold([one.see(pipeline.site_for(i, site, found))])  # noqa: E731
                found[index][asked] = measured(asked, look)
    return found


def seen(look: Look, pipeline: Pipeline, stored: Stored, noise: Sequence[np.ndarray] = (), offset: int = 0) -> Any:
    """What the kernels see in one block, of the first stage."""
    program = pipeline.fused(len(stored.experts))
    assert program is not None
    ((backend, _),) = backends([Sight(look, program, 0, len(stored.experts), {}, noise, Rows)])
    assert backend.add(stored, offset) == 0
    return backend.results()[0]


def noise_for(program: Program, site: Site) -> list[np.ndarray | None]:
    """Of each filter of a program."""
    of = site.seed, site.key.name, site.names
    return [noise.draws(*of, one.salt, one.shares) if one.salt else None for one in program.before]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(PIPELINES)),
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(), (1,), (37,), (3, 5), (1, STRIP + 1), (7, 300)]),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4),
    out=st.sampled_from(sorted(WRITTEN)),
    near=st.booleans(),
)
def test_any_bits_give_what_torch_gives(
    name: str, seed: int, shape: tuple[int, ...], dtypes: list[str], out: str, near: bool
) -> None:
    """Every dtype, subnormal and huge numbers, zeros of both signs; `near`: experts that change few entries."""
    pipeline = pipeline_of(name)
    program = pipeline.fused(3)
    assert program is not None
    assume(shape or not program.ranks)  # a single number is no ranking
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    patterns = [random_bits(rng, dtype, size).reshape(shape) for dtype in dtypes]
    if near:
        dtypes = [dtypes[0]] * 4
        patterns = [patterns[0], *(np.where(rng.random(shape) < 0.3, random_bits(rng, dtypes[0], size).reshape(shape),
                                            patterns[0]) for _ in range(3))]  # fmt: skip
    base, *experts = [bits_to_tensor(bits.copy(), dtype).float() for bits, dtype in zip(patterns, dtypes, strict=True)]
    assume(bool((torch.stack(experts) - base).isfinite().all()))
    site = Site(Key("w", shape, out), torch.stack(experts), base, names=("e0", "e1", "e2"), seed=3)
    found = found_by_torch(pipeline, site)
    want = pipeline.merge(site, found).to(getattr(torch, out))
    salted = noise_for(program, site)
    stored = Stored(patterns[1:], dtypes[1:], patterns[0], dtypes[0])
    got, bad = Merge(program, found, salted).merge(stored, out)
    result = bits_to_tensor(got.copy(), out)
    finite = want.isfinite()
    assert torch.equal(result[finite], want[finite])
    assert bool(torch.equal(result.signbit()[finite], want.signbit()[finite])), "zeros of another sign"
    assert bad == int((~finite).sum())


def test_marks_are_not_shared_where_other_cuts_were_found() -> None:
    """Variants of a sweep may have equal filters in front, whose cuts over the model differ."""
    rng = np.random.default_rng(0)
    rows = [random_bits(rng, "bfloat16", 900).reshape(30, 30) & 0xBFFF for _ in range(2)]
    stored = Stored([rows[1]], ["bfloat16"], rows[0], "bfloat16")
    cut = registry("magnitude")().fused(1)
    filters = (cut, registry("della")(rescale=False).fused(1))
    salted = [None, noise.draws(0, "w", ["a"], "della", [0.35])]
    kept = []
    for threshold in (0x3F000000, 0x40000000):
        one = np.array([[threshold]])
        found = {0: {cut.cut: Cuts(one, one * 0, one * 0, 900)}}
        walk = Job(filters, 1, found, salted, again=True)
        walk.block(stored, 0)
        kept.append(stored.kept.get(walk._which[1]))
    assert kept[0] is not None
    assert not np.array_equal(*kept)


@pytest.mark.parametrize("stages", [
    ["dare", "linear"],
    ["lines", "task_arithmetic"],
    ["dare", "slerp"],
])  # fmt: skip
def test_what_no_kernel_does(stages: list[str]) -> None:
    assert Pipeline(tuple(registry(name)() for name in stages)).fused(3) is None


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_slerp_equals_torch(t: float, dtype: str, with_base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *experts = models(2, dtype, "smooth")
    given: tuple[State | None, list[State]] = (base, experts[:1]) if with_base else (None, experts)
    assert Pipeline((registry("slerp")(t=t),)).fused(1) is not None
    by_kernels = merged(*given, "slerp", t=t)
    monkeypatch.setenv("WEIGHTSMITH_KERNELS", "0")
    by_torch = merged(*given, "slerp", t=t)
    assert bits(by_kernels) == bits(by_torch)


MIXED: Mapping[str, dict[str, Any]] = {
    "karcher": {"weight": [0.2, 1.0, 0.5]},
    "model_stock": {},
    "multislerp": {"weight": [0.2, 1.0, 0.5]},
    "nuslerp": {"weight": [0.2, 1.0]},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("method", "with_base"), [(m, b) for m in MIXED for b in (True, False) if b or m != "model_stock"]
)
def test_mixtures_equal_torch(method: str, dtype: str, with_base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *experts = models(3, dtype, "smooth")
    count = next((check.high for check in registry(method).traits.checks if isinstance(check, Count)), None) or 3
    given = base if with_base else None, experts[:count]
    assert Pipeline((registry(method)(**MIXED[method]),)).fused(count) is not None
    monkeypatch.setattr("weightsmith.core.task.BLOCK", 1 << 14)  # several blocks per tensor
    by_kernels = merged(*given, {method: MIXED[method]})
    monkeypatch.setenv("WEIGHTSMITH_KERNELS", "0")
    assert bits(by_kernels) == bits(merged(*given, {method: MIXED[method]}))
    monkeypatch.setattr("weightsmith.ops.reduce.native.kernels", lambda: None)
    assert bits(by_kernels) == bits(merged(*given, {method: MIXED[method]}))


@pytest.mark.parametrize("method", ["slerp", {"dare": {"rescale_rule": "l1"}}, "dare", "magnitude", "consensus"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_input_is_found_where_it_is(method: Any, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightsmith.core.task.BLOCK", 1 << 14)
    base, expert = models(1, "bfloat16", "smooth")
    wrong = torch.zeros(9000, 7, dtype=torch.bfloat16)
    base["last"], expert["last"] = wrong, wrong.clone()
    expert["last"][8999, 3] = value
    with pytest.raises(NumericError, match=r"last.*e0.*8999"):
        merged(base, [expert], method)


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 1000003])
@pytest.mark.parametrize("share", [0.0001, 0.5, 1 - 2**-33, 1.0])
def test_kernels_draw_the_noise_that_numpy_draws(offset: int, share: float) -> None:
    """A stream per expert; the masses show what is left of a task vector of ones."""
    rows, width = 5, STRIP + 3
    ones = np.full((rows, width), 0x3F80, "u2")
    stored = Stored([ones, ones], ["bfloat16"] * 2, np.zeros_like(ones), "bfloat16")
    draws = noise.draws(5, "w", ("a", "b"), "dare", (share, share))
    totals = seen(Masses(), registry("dare")(density=share) | TaskArithmetic(), stored, [draws], offset)
    for i, expert in enumerate(("a", "b")):
        kept = noise.bernoulli(5, "w", expert, "dare", offset, rows * width, share).reshape(rows, width)
        assert np.array_equal(totals["masked"].values[i], kept.sum(1))
        assert np.array_equal(totals["whole"].values[i], np.full(rows, width))


@pytest.mark.parametrize("deltas", [True, False])
@pytest.mark.parametrize("size", [0, 1, STRIP - 1, STRIP, 3 * STRIP + 5])
def test_dots_of_stored_bits(size: int, deltas: bool) -> None:
    """With one other array, whatever each input is stored as; a broken input shows in its own sum."""
    draw = torch.Generator().manual_seed(size)
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
    base, other, *experts = (torch.randn(size, generator=draw) for _ in range(6))
    inputs = [x.to(kind) for x, kind in zip(experts, kinds, strict=True)]
    views = {torch.float32: torch.uint32, torch.float8_e4m3fn: torch.uint8}
    bits = [x.view(views.get(x.dtype, torch.uint16)).numpy() for x in [*inputs, base]]
    stored = Stored(bits[:-1], [str(kind)[6:] for kind in kinds], bits[-1], "float32")
    want = torch.stack([(x.float() - base * deltas).double() @ other.double() for x in inputs]).numpy()
    np.testing.assert_allclose(dots(stored, other.numpy(), deltas), want, rtol=1e-6, atol=1e-5)
    if size > 1:
        bits[1][size // 2] = 0x7FC0
        assert np.isnan(dots(stored, other.numpy(), deltas)).tolist() == [False, True, False, False]


@pytest.mark.parametrize("width", [1, 2, 3, 5, 64, STRIP - 1, STRIP, 3 * STRIP + 5])
def test_sums_have_the_order_of_torch(width: int) -> None:
    draw = torch.Generator().manual_seed(width)
    a, b = (
        torch.randn(4, width, generator=draw) * 10 ** torch.randint(-9, 9, (4, width), generator=draw) for _ in "ab"
    )
    stored = Stored([a.view(torch.uint32).numpy(), b.view(torch.uint32).numpy()], ["float32"] * 2)
    want = torch.stack([row_sums(x.double() * y) for x, y in ((a, a), (a, b), (b, b))]).numpy()
    assert np.array_equal(seen(Products(Mix()), Pipeline((Karcher(),)), stored)["products"].values, want)
    assert np.array_equal(row_products([a, b]).numpy(), want)
    assert np.array_equal(row_squares(b).numpy(), want[2])
    assert np.array_equal(row_sizes(a).numpy(), row_sums(a.abs()).numpy())
    pair = Stored(stored.experts[:1], ["float32"], stored.experts[1], "float32")
    masses = seen(
        Masses(), registry("dare")(density=1.0) | TaskArithmetic(), pair, noise.draws(0, "", ("",), "", (1.0,))
    )
    delta = (a - b)[None]
    assert np.array_equal(masses["whole"].values, l1_sums(delta, delta)["whole"].values.numpy())  # type: ignore[union-attr]
