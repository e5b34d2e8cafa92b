"""Selection by magnitude against sorting, for every way to cut."""

from __future__ import annotations

import pytest
import torch
from driver import Given, every, run, sites
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.core.keys import Key
from weightsmith.core.method import Pipeline
from weightsmith.core.pass_ import fold, measured
from weightsmith.core.site import Site
from weightsmith.methods.magnitude import Magnitude
from weightsmith.methods.task_arithmetic import TaskArithmetic
from weightsmith.ops import select


def by_sorting(values: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Ranks first .. last by falling magnitude, equals by rising index."""
    order = sorted(range(values.numel()), key=lambda i: (-abs(float(values.reshape(-1)[i])), i))
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[torch.tensor(order[first:last], dtype=torch.int64)] = True
    return mask.reshape(values.shape)


def selected(stack: torch.Tensor, cuts: list[list[int]], step: int, whole: bool = False) -> list[torch.Tensor]:
    key = Key("w", tuple(stack.shape[1:]), "float32")
    lows = range(0, stack.shape[1], step)
    sites = [Site(key, stack[:, low : low + step], is_delta=True, start=low) for low in lows]
    found = measured(Given(whole, tuple(map(tuple, cuts))), lambda look: fold(map(look.see, sites)))
    blocks = [found.before(site.stack, site.start) for site in sites]
    return [torch.cat(parts, 1) for parts in zip(*blocks, strict=True)]


floats = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 3.5, -3.5, 1e-40, 1e-30, 65504.0, -3e38])


@settings(max_examples=15, deadline=None)
@given(st.lists(floats, min_size=12, max_size=12), st.integers(0, 12), st.integers(0, 12), st.integers(1, 6))
def test_selection_equals_sorting_however_cut(values, first, second, step):
    stack = torch.tensor(values).reshape(1, 6, 2)
    one, two = selected(stack, [[first, second]], step)
    assert torch.equal(one[0], by_sorting(stack[0], 0, first))
    assert torch.equal(two[0], by_sorting(stack[0], 0, second))


def test_without_splitting_equals_all_of_them_are_kept():
    stack = torch.tensor([[[1.0, -2.0], [2.0, 2.0], [0.0, 3.0]]])
    (kept,) = selected(stack, [[2]], 1, whole=True)
    assert kept[0].tolist() == [[False, True], [True, True], [False, True]]


@settings(max_examples=40, deadline=None)
@given(st.lists(floats, min_size=12, max_size=12), st.integers(0, 7))
def test_leading_takes_the_lower_index_of_equals(values, count):
    rows = torch.tensor(values).reshape(2, 6)
    assert torch.equal(select.leading(rows, count), torch.stack([by_sorting(r, 0, count) for r in rows]))


def test_float64_is_ranked_by_its_float32_magnitude():
    stack = torch.tensor([[1.0, 1.0 + 1e-12, -5.0, 0.1]], dtype=torch.float64).reshape(1, 4)
    (kept,) = selected(stack, [[2]], 4)
    assert kept[0].tolist() == [True, False, True, False]


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.99, 1.0])
def test_magnitude_keeps_exactly_the_share_and_the_norm(density):
    base = {"w": torch.zeros(9, 7)}
    change = torch.randn(9, 7, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # many equals
    given = sites({"a": {"w": change}}, base)
    pipeline = Pipeline((Magnitude(density=density), TaskArithmetic()))
    out = run(pipeline, given, every(2))["w"]
    kept = by_sorting(change, 0, max(1, int(density * 63)))
    assert torch.equal(out, torch.where(kept, change, 0.0))
    scaled = run(Pipeline((Magnitude(density=density, rescale=True), TaskArithmetic())), given)["w"]
    assert float(scaled.abs().sum()) == pytest.approx(float(change.abs().sum()), rel=1e-6)
    assert torch.equal(scaled != 0, out != 0)
