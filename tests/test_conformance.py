"""Laws that every registered method and filter obeys.  Registered means tested: there is no list to add to.

A new statistic needs an entry in `STATISTICS`; a new parameter that can be neutral, one in `NEUTRAL`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import weightsmith
from kit import GIVEN, count_for, noise, refusal
from methods.driver import every, run, sites, whole
from weightsmith.core.errors import RecipeError
from weightsmith.core.method import (
    BASE,
    Filter,
    Grain,
    MergedFilter,
    Method,
    Parameter,
    Pipeline,
    Stage,
    registered,
    registry,
)
from weightsmith.core.site import Site
from weightsmith.core.task import one_by_one, takes_deltas
from weightsmith.plan.costs import costs_of
from weightsmith.plan.peak import scratch

STAGES = {
    n: cls for n, cls in registered().items() if issubclass(cls, (Filter, Method)) and cls.grain is not Grain.GROUP
}
"""Codecs and methods of GROUP grain have suites of their own."""

NEUTRAL = {
    **{"density": 1.0, "remove_top": 0.0, "weight": 1.0, "scaling": 1.0, "lambda": 1.0, "alpha": 1.0, "beta": 0.0},
    "k": 0,
    "factor": 1.0,
}
"""Parameter values with which filters change nothing, and one expert comes back."""

CHANGES_ONE = {"arcee_fusion", "doge", "iso_c", "iso_cts", "keep", "knots", "nearswap", "pcb", "slerp"}
"""Those that make something else of one expert at weight 1."""

ORDERED = {"opcm"}
"""Those for which the order of the experts matters."""

SHAPES = {
    "model.embed_tokens.weight": (12, 6),
    "model.layers.0.mlp.up_proj.weight": (7, 5),
    "model.layers.0.norm.weight": (9,),
    "model.layers.1.mlp.up_proj.weight": (5, 7),
    "model.layers.1.conv.weight": (4, 3, 2),
    "one_row.weight": (1, 6),
    "one_column.weight": (6, 1),
    "scalar": (),
}


def models(count: int, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A base and experts near it, of ordinary tensors."""
    base = {n: noise(*s, seed=seed + i) for i, (n, s) in enumerate(SHAPES.items())}
    experts = {
        f"e{j}": {n: b + 0.1 * noise(*b.shape, seed=100 * j + i + seed + 50) for i, (n, b) in enumerate(base.items())}
        for j in range(count)
    }
    return base, experts


def nasty(count: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Tensors that break careless arithmetic."""
    base, experts = models(count)
    square = noise(6, 6, seed=7)
    for name, start, changes in [
        ("zero_delta", square, [torch.zeros(6, 6)] * count),
        ("all_zero", torch.zeros(6, 6), [torch.zeros(6, 6)] * count),
        ("constant", torch.ones(6, 6), [torch.full((6, 6), 0.5 + j) for j in range(count)]),
        ("equal_experts", square, [torch.eye(6)] * count),
        ("one_is_the_base", square, [noise(6, 6, seed=30 + j) * min(j, 1) for j in range(count)]),
        (
            "rank_deficient",
            torch.zeros(6, 6),
            [torch.outer(noise(6, seed=j), noise(6, seed=j + 9)) for j in range(count)],
        ),
        ("cancelling", torch.zeros(6, 6), [square * (-1) ** j for j in range(count)]),
        ("huge", square * 1e30, [noise(6, 6, seed=40 + j) * 1e29 for j in range(count)]),
        ("tiny", square * 1e-30, [noise(6, 6, seed=50 + j) * 1e-31 for j in range(count)]),
        ("empty", torch.zeros(0, 4), [torch.zeros(0, 4)] * count),
    ]:
        base[name] = start
        for state, change in zip(experts.values(), changes, strict=True):
            state[name] = start + change
    return base, experts


def fisher(stage: Stage, name: str, shape: tuple[int, ...], seed: int) -> Tensor | None:
    return noise(*shape, seed=seed).square() * 1e-4


def gram(stage: Stage, name: str, shape: tuple[int, ...], seed: int) -> Tensor | None:
    if len(shape) != 2 or "embed" in name:
        return None
    rows = noise(20, shape[0 if getattr(stage, "transposed", False) else 1], seed=seed)
    return rows.T @ rows / 20


STATISTICS = {"fisher": fisher, "gram": gram, "second_moment": fisher}


def statistics(stage: Stage, experts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    kinds = [n for n in stage.traits.needs if n != BASE]
    out: dict[str, Any] = {m: {k: {} for k in kinds} for m in experts}
    for j, (model, state) in enumerate(experts.items()):
        for kind in kinds:
            for i, (name, tensor) in enumerate(state.items()):
                value = STATISTICS[kind](stage, name, tuple(tensor.shape), seed=1000 + 100 * j + i)
                if value is not None:
                    out[model][kind][name] = value
    return out


def variants(cls: type[Stage]) -> Iterator[Stage]:
    """The defaults, and each word, switch and list of numbers by itself."""
    given = GIVEN.get(cls.traits.name, {})
    yield cls(**given)
    for p in cls.parameters():
        if p.kind == "flag":
            yield cls(**{**given, p.field: not p.default})
        for word in p.options:
            if word != p.default:
                yield cls(**{**given, p.field: word})


def pipeline(stage: Stage) -> Pipeline:
    """A stage completed to something that merges."""
    if isinstance(stage, Method):
        return Pipeline((stage,))
    plain = registry("task_arithmetic")()
    return plain | stage if isinstance(stage, MergedFilter) else stage | plain


def neutral(cls: type[Stage]) -> Stage:
    known = [(p, NEUTRAL[p.name]) for p in cls.parameters() if p.name in NEUTRAL]
    return cls(**{p.field: value for p, value in known if p.check(value) is None})


def prepare(stage: Stage, base: Any, experts: Any, seed: int = 0) -> dict[str, Site]:
    return sites(experts, base, statistics(stage, experts), seed)


def near(a: Tensor, b: Tensor, scale: Tensor, share: float = 1e-5) -> bool:
    """Equal up to rounding of numbers as large as those in `scale`."""
    reach = float(scale.abs().max()) if scale.numel() else 0.0
    return a.shape == b.shape and bool(((a - b).abs().double() <= share * reach).all())


each_stage = pytest.mark.parametrize("cls", [pytest.param(c, id=n) for n, c in STAGES.items()])
each_variant = pytest.mark.parametrize(
    "stage", [pytest.param(s, id=repr(s)) for cls in STAGES.values() for s in variants(cls)]
)


@each_variant
def test_finite_shaped_and_inputs_untouched(stage: Stage):
    base, experts = nasty(count_for(stage))
    given = prepare(stage, base, experts)
    stacks = {n: s.stack.clone() for n, s in given.items()}
    bases = copy.deepcopy(base)
    for name, merged in run(pipeline(stage), given).items():
        assert merged.shape == base[name].shape, name
        assert merged.dtype == base[name].dtype, name
        assert torch.isfinite(merged).all(), name
        assert torch.equal(given[name].stack, stacks[name]), name
        assert torch.equal(base[name], bases[name]), name


@each_variant
def test_the_same_bytes_however_cut_and_by_however_many_threads(stage: Stage):
    base, experts = nasty(count_for(stage))
    given = prepare(stage, base, experts, seed=3)
    expected = run(pipeline(stage), given)
    assert torch.get_num_threads() == 1
    for cut in [every(2), every(5)]:  # 5 of 6 rows leaves a block of one
        got = run(pipeline(stage), given, cut)
        assert [n for n in expected if not torch.equal(got[n], expected[n])] == []
    torch.set_num_threads(2)
    try:
        threaded = run(pipeline(stage), given, whole)
    finally:
        torch.set_num_threads(1)
    assert [n for n in expected if not torch.equal(threaded[n], expected[n])] == []


@each_variant
def test_the_engine_merges_as_the_driver_does(stage: Stage):
    base, experts = models(count_for(stage))
    expected = run(pipeline(stage), prepare(stage, base, experts))
    stats = statistics(stage, experts) if set(stage.traits.needs) - {BASE} else None
    got = weightsmith.merge(experts, pipeline(stage), base=base, stats=stats)
    # Model-wide float sums are taken over blocks of another size here.
    assert [n for n in expected if not near(got[n], expected[n], base[n], 1e-6)] == []


@each_variant
def test_copies_of_the_base_give_the_base(stage: Stage):
    base, _ = nasty(1)
    count = count_for(stage)
    if BASE not in stage.traits.needs and not getattr(stage, "normalize", True) and hasattr(stage, "weight"):
        stage = dataclasses.replace(stage, weight=1 / count)  # a sum, so make it a mean
    experts = {f"e{j}": base for j in range(count)}
    for name, merged in run(pipeline(stage), prepare(stage, base, experts)).items():
        assert near(merged, base[name], base[name]), name


@each_stage
def test_one_expert_comes_back_where_promised(cls: type[Stage]):
    stage = neutral(cls)
    if refusal(stage, 1):
        return
    base, experts = models(1)
    merged = run(pipeline(stage), prepare(stage, base, experts))
    kept = [near(merged[name], experts["e0"][name], base[name]) for name in merged]
    assert all(kept) != (cls.traits.name in CHANGES_ONE)


@each_stage
def test_the_order_of_experts_does_not_matter_where_promised(cls: type[Stage]):
    stage = cls()
    base, experts = models(count_for(stage))
    given = prepare(stage, base, experts)
    stats = statistics(stage, experts)
    turned = {n: experts[n] for n in reversed(experts)}
    other = sites(turned, base, {n: stats[n] for n in turned})
    first, second = run(pipeline(stage), given), run(pipeline(stage), other)
    moved = [n for n in first if not near(second[n], first[n], base[n])]
    assert bool(moved) == (cls.traits.name in ORDERED)


@each_stage
def test_values_survive_repr_pickle_and_comparison(cls: type[Stage]):
    for stage in variants(cls):
        assert pickle.loads(pickle.dumps(stage)) == stage
        assert hash(copy.deepcopy(stage)) == hash(stage)
        assert eval(repr(stage), {cls.__name__: cls}) == stage
        with pytest.raises(AttributeError):
            stage.anything = 1  # type: ignore[attr-defined]


def outside(p: Parameter) -> Iterator[Any]:
    """Values that a parameter must refuse."""
    yield "nonsense"
    yield None
    if p.kind in ("flag", "choice"):
        yield 2
        return
    yield math.nan
    yield math.inf
    if p.low > -math.inf:
        yield p.low if p.low_open else p.low - 0.5
    if p.high < math.inf:
        yield p.high if p.high_open else p.high + 0.5
    yield (p.default, "nonsense") if p.each else (0.5, 0.5)


@each_stage
def test_parameters_are_described_and_bad_values_refused_by_name(cls: type[Stage]):
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}("), "a public class says what it does"
    assert len(cls.parameters()) == len(dataclasses.fields(cls))
    for p in cls.parameters():
        assert p.help
        assert p.check(p.default) is None
        for bad in outside(p):
            with pytest.raises(RecipeError, match=rf"{cls.traits.name}: {p.name}\b"):
                cls(**{p.field: bad})


@each_variant
def test_gradients_flow_to_the_experts(stage: Stage):
    base, experts = models(count_for(stage))
    name = "model.layers.1.mlp.up_proj.weight"
    given = prepare(stage, {name: base[name]}, {m: {name: s[name]} for m, s in experts.items()})
    stack = given[name].stack.requires_grad_()
    merged = run(pipeline(stage), given)[name]
    if stage.traits.name == "keep":
        assert not merged.requires_grad
        return
    (gradient,) = torch.autograd.grad(merged.square().sum(), stack)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


@each_stage
def test_neutral_filters_change_nothing(cls: type[Stage]):
    if not issubclass(cls, Filter) or cls.traits.name == "agree":  # which holds an election whatever it trims
        return
    stage = neutral(cls)
    plain = registry("task_arithmetic")()
    base, experts = nasty(count_for(stage))
    given = prepare(stage, base, experts)
    with_filter, without = run(pipeline(stage), given), run(Pipeline((plain,)), given)
    assert [n for n in without if not torch.equal(with_filter[n], without[n])] == []


class Peak(TorchDispatchMode):
    """Bytes of all tensors made inside and still alive, at their highest."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                continue
            if tensor.untyped_storage().data_ptr() not in inputs:
                size = tensor.untyped_storage().nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(tensor.untyped_storage(), self._freed, size)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


def as_planned(stages: Pipeline, site: Site) -> Site:
    """What the engine hands over: task vectors where all stages want them, read one by one where they ask so."""
    if not takes_deltas(stages):
        return site
    deltas = site.deltas
    site = replace(site, stack=deltas, is_delta=True)
    return replace(site, stack=deltas.to("meta"), each=Read(deltas)) if one_by_one(stages) else site


class Read(tuple[Tensor, ...]):
    """Gives a copy whenever one is asked for, as a file does."""

    def __iter__(self) -> Iterator[Tensor]:
        return map(torch.clone, super().__iter__())


def bytes_made(stage: Stage, wanted: int, side: int = 512) -> tuple[int, int]:
    """(experts, peak bytes of the tensors that merging one square block makes, without what a plan counts apart)."""
    name = "model.layers.1.mlp.up_proj.weight"
    if any(p.name == "iters" for p in stage.parameters()):
        stage = dataclasses.replace(stage, iters=2)  # every iteration needs the same memory
    count, whole = count_for(stage, wanted), pipeline(stage)
    base = {name: noise(side, side, seed=1)}
    experts = {f"e{j}": {name: base[name] + noise(side, side, seed=2 + j)} for j in range(count)}
    given = {name: as_planned(whole, site) for name, site in prepare(stage, base, experts).items()}
    with Peak() as watch:
        run(whole, given)
    apart = (4 if one_by_one(whole) else 2) + 2 * costs_of(stage).solves
    return count, watch.peak - int(apart * side * side * 4)


@each_variant
def test_scratch_is_honest(stage: Stage):
    """Merging stays within what the plan predicts from the table of costs, whatever the number of experts."""
    side = 512  # a block as large as the engine's
    for wanted in (1, 3):
        count, made = bytes_made(stage, wanted, side)
        allowed = scratch(pipeline(stage), count + 1, side, side)
        assert made <= allowed, f"{count}: needs {made / side**2 / 4:.2f} matrices"
