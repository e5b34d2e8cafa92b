"""Numbers that are none: found in every input and on every path, with tensor, model and place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.core.errors import NumericError
from weightsmith.core.keys import DTYPES
from weightsmith.io.read.source import holds_nonfinite, tensor_to_bits
from weightsmith.jobs.api import merge
from weightsmith.kernels.merge import available

ROWS, COLUMNS = 300, 1000  # two blocks
FLOATS = [d.name for d in DTYPES.values() if d.floating]


@pytest.fixture(params=["fused", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways that a merge on the CPU is calculated."""
    if request.param == "torch":
        monkeypatch.setenv("WEIGHTSMITH_KERNELS", "0")
    else:
        assert available()
    return str(request.param)


def model(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)}


WIDE = model(0, torch.float32)
"""Beside it a float32 tensor is not wider than its neighbours, which would keep its dtype."""


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare", "tsvm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("victim", ["base", "m0", "m1"])
@pytest.mark.parametrize("row", [0, 299])
def test_a_bad_number_is_found_wherever_it_is(method: str, value: float, victim: str, row: int, path: str) -> None:
    models = {"base": model(0), "m0": model(1), "m1": model(2)}
    models[victim]["w"][row, 7] = value
    said = {"nan": "NaN", "inf": "Inf", "-inf": "-Inf"}[str(value)]
    with pytest.raises(NumericError, match=rf"w in {victim} holds {said} at \[{row}, 7\] \(1 in this block\)"):
        merge([models["m0"], models["m1"]], method, base=models["base"])


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bad_number_that_is_only_copied(dtype: str, path: str) -> None:
    kind = getattr(torch, dtype)
    bad = torch.ones(4, 3).to(kind)
    bad[2, 1] = float("nan")
    base = model(0) | {"kept": bad}
    with pytest.raises(NumericError, match=r"kept in base holds NaN at \[2, 1\]"):
        keep(base, [model(1), model(2)])


def keep(base: dict[str, torch.Tensor], models: list[dict[str, torch.Tensor]], **more: Any) -> dict[str, torch.Tensor]:
    from weightsmith.engine.carry import carry_out
    from weightsmith.inputs.opened import Inputs
    from weightsmith.io.read.source import MemorySource
    from weightsmith.io.write.sink import MemorySink
    from weightsmith.plan.plan import make_plan
    from weightsmith.recipe.schema import ModelRef, Output, Recipe, StageSpec

    names = [f"m{i}" for i in range(len(models))]
    recipe = Recipe(
        base=ModelRef(model="base"),
        models={name: ModelRef(model=name) for name in names},
        method=(StageSpec(name="linear"),),
        exclude=("kept",),
        output=Output(dtype=more.pop("dtype", None)),
        **more,
    )
    inputs = Inputs(MemorySource(base), dict(zip(names, map(MemorySource, models), strict=True)))
    sink = MemorySink()
    carry_out(make_plan(recipe, sources=inputs), inputs, sink)
    return sink.tensors()


def test_bad_numbers_are_let_through_only_where_the_recipe_says_so(path: str) -> None:
    bad = torch.ones(2)
    bad[1] = float("nan")
    merged = keep(model(0) | {"kept": bad}, [model(1)], nonfinite="allow")
    assert merged["kept"].isnan().tolist() == [False, True]


def test_a_copy_in_another_dtype_says_what_does_not_fit() -> None:
    base = WIDE | {"kept": torch.tensor([1.0, 7e4, -1e5])}
    with pytest.raises(NumericError, match=r"kept: 2 values from row 0 on do not fit into float16 \(largest 1e\+05\)"):
        keep(base, [WIDE], dtype="float16")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FLOATS), st.lists(st.integers(0, 255), min_size=8, max_size=64))
def test_the_look_at_bits_agrees_with_torch(dtype: str, raw: list[int]) -> None:
    size = DTYPES[dtype].itemsize
    data = torch.tensor(raw[: len(raw) // size * size], dtype=torch.uint8).view(getattr(torch, dtype))
    value = data.to(torch.float64)
    assert holds_nonfinite(tensor_to_bits(data), dtype) == (not bool(torch.isfinite(value).all()))


# --- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_result_that_is_none(dtype: torch.dtype, path: str) -> None:
    large = {"w": torch.full((ROWS, COLUMNS), 3e38).to(dtype)}
    with pytest.raises(NumericError, match=r"w: linear gives Inf at \[0, 0\] although all inputs are finite"):
        merge([large, large], "linear", weight=1.0, normalize=False)


def test_bfloat16_overflows_in_the_cast_alike_on_both_paths(path: str) -> None:
    """3.399e38 is a float32, but rounds to Inf in bfloat16."""
    models = [{"w": torch.full((ROWS, COLUMNS), value)} for value in (1.0, 0.0)]
    models[0]["w"][3, 5:8] = 3.3999e38
    with pytest.raises(NumericError, match=r"w: 3 values from row 0 on do not fit into bfloat16 \(largest 3\.4e\+38\)"):
        merge(models, "linear", dtype="bfloat16", weight={"m0": 1.0, "m1": 0.0})


@pytest.mark.parametrize(
    ("dtype", "value", "count"), [("float16", 7e4, 4), ("float8_e4m3fn", 500.0, 4), ("float8_e5m2", 6.5e4, 4)]
)
def test_narrow_dtypes(dtype: str, value: float, count: int, path: str) -> None:
    part = {"w": torch.ones(10, 10)}
    part["w"][2, :count] = value
    with pytest.raises(NumericError, match=rf"w: {count} values from row 0 on do not fit into {dtype} \(largest"):
        merge([part, part], "linear", dtype=dtype)


def test_numbers_that_just_fit_and_infinities_in_a_dtype_without_them() -> None:
    fits = {"kept": torch.tensor([448.0, 464.0, -464.0])}
    assert keep(WIDE | fits, [WIDE], dtype="float8_e4m3fn")["kept"].float().tolist() == [448, 448, -448]
    inf = {"kept": torch.tensor([1.0, float("inf")])}
    kept = keep(WIDE | inf, [WIDE], dtype="float8_e4m3fn", nonfinite="allow")["kept"]
    assert kept.float().isnan().tolist() == [False, True]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare", "slerp", "breadcrumbs", "consensus"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_every_kernel_counts_what_does_not_fit(method: str, stored: str, path: str) -> None:
    """7e4 is no float16.  The kernels only see that something is wrong; the words are those of torch."""
    base, tuned = ({"w": torch.zeros(ROWS, COLUMNS)} for _ in range(2))
    for part in (base, tuned):
        part["w"][41, 3:6] = 7e4
    tuned["w"][200] = 0.25
    models = [{"w": part["w"].to(getattr(torch, stored))} for part in (tuned, tuned)]
    kept = {"w": base["w"].to(getattr(torch, stored))}
    given: dict[str, Any] = {"slerp": {"t": 0.5}, "dare": {"density": 1.0}}.get(method, {})
    said = r"w: [36] values from row \d+ on do not fit into float16 \(largest (7|6.99)"
    with pytest.raises(NumericError, match=said):
        merge(models[: 1 if method == "slerp" else 2], method, base=kept, dtype="float16", **given)


def test_float64_overflows_in_float32() -> None:
    part = {"w": torch.tensor([1.0, 1e300], dtype=torch.float64)}
    with pytest.raises(NumericError, match=r"w: 1 values from row 0 on do not fit into float32 \(largest 1e\+300\)"):
        merge([part, part], "linear", dtype="float32")


def test_nothing_is_left_behind_where_a_run_stopped_at_its_first_tensor(tmp_path: Path) -> None:
    bad = model(1)
    bad["w"][0, 0] = float("nan")
    with pytest.raises(NumericError):
        merge([bad, model(2)], "linear", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_too(value: float) -> None:
    stats = {name: {"fisher": {"w": torch.ones(ROWS, COLUMNS)}} for name in ("m0", "m1")}
    stats["m1"]["fisher"]["w"][280, 4] = value
    with pytest.raises(NumericError, match=r"w in the fisher of m1 holds (NaN|Inf) at \[280, 4\]"):
        merge([model(1), model(2)], "fisher", base=model(0), stats=stats)
    grams = {name: {"gram": {"w": torch.eye(COLUMNS)}} for name in ("m0", "m1")}
    grams["m0"]["gram"]["w"][5, 6] = value
    with pytest.raises(NumericError, match=r"w in the gram of m0 holds (NaN|Inf) at \[5, 6\]"):
        merge([model(1), model(2)], "regmean", base=model(0), stats=grams)


def test_both_paths_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for there in ("1", "0"):
        monkeypatch.setenv("WEIGHTSMITH_KERNELS", there)
        models = [model(1), model(2)]
        models[1]["w"][np.array([40, 40, 250]), np.array([3, 9, 1])] = float("nan")
        with pytest.raises(NumericError) as error:
            merge(models, "ties", base=model(0))
        said.append(str(error.value))
    assert said[0] == said[1]
    assert re.search(r"w in m1 holds NaN at \[40, 3\] \(3 in this block\)", said[0])


def test_a_base_that_is_calculated_and_not_needed(tmp_path: Path, path: str) -> None:
    """It is looked at, and the kernels are not handed bits that it does not have."""
    from weightsmith.io.read.source import MemorySource

    class Calculated(MemorySource):
        def computes(self, name: str) -> bool:
            return True

        def block(self, *where: Any, **_: Any) -> torch.Tensor:
            return super().block(*where).tensor()

    base = model(0)
    expected = merge([model(1), model(2)], "linear")["w"]
    assert merge([model(1), model(2)], "linear", base=Calculated(base))["w"].equal(expected)
    base["w"][5, 5] = float("nan")
    with pytest.raises(NumericError, match=r"w in base holds NaN at \[5, 5\]"):
        merge([model(1), model(2)], "linear", base=Calculated(base))
