"""The fused kernels give the bytes that the torch path gives."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.io.source import bits_to_tensor
from weightsmith.keys import Key
from weightsmith.method import WeightedSum
from weightsmith.ops import fused
from weightsmith.ops.combine import apply_weighted_sum
from weightsmith.site import Site

DTYPES = fused.FUSED_DTYPES


def by_torch(spec: WeightedSum, inputs: list[np.ndarray], base: np.ndarray, dtypes: list[str], out: str) -> np.ndarray:
    """The meaning: what the engine's torch path computes."""
    stack = torch.stack([bits_to_tensor(x, d).float() for x, d in zip(inputs, dtypes[1:], strict=True)])
    site = Site(Key("w", tuple(stack.shape[1:]), out), stack, bits_to_tensor(base, dtypes[0]).float())
    result = apply_weighted_sum(spec, site).to(getattr(torch, out))
    return result.view(torch.uint16 if out == "bfloat16" else torch.uint32).numpy()


def random_bits(rng: np.random.Generator, dtype: str, size: int, *, finite: bool = True) -> np.ndarray:
    """Any finite pattern: denormals, signed zeros, huge and tiny values."""
    width, exponent = ("u2", 0x7F80) if dtype == "bfloat16" else ("u4", 0x7F800000)
    bits = rng.integers(0, np.iinfo(width).max, size, width, endpoint=True)
    if finite:
        bits[(bits & exponent) == exponent] &= ~np.array(exponent >> 1, width)
    return bits


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([0, 1, 2, 7, 33, 1000, fused.STRIP - 1, fused.STRIP, fused.STRIP + 5]),
    weights=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4),
    divisor=st.sampled_from([1.0, 3.0, 0.7]),
    scale=st.sampled_from([1.0, 0.3, -1.5]),
    deltas=st.booleans(),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    out=st.sampled_from(DTYPES),
)
def test_kernel_equals_torch(
    seed: int,
    size: int,
    weights: list[float],
    divisor: float,
    scale: float,
    deltas: bool,
    dtypes: list[str],
    out: str,
) -> None:
    rng = np.random.default_rng(seed)
    dtypes = dtypes[: len(weights) + 1]
    base, *inputs = [random_bits(rng, d, size) for d in dtypes]
    spec = WeightedSum(tuple(weights), divisor, scale if deltas else 1.0, deltas)
    got, bad = fused.weighted_sum(spec, inputs, base, out)
    want = by_torch(spec, inputs, base, dtypes, out)
    finite = np.isfinite(bits_to_tensor(want.copy(), out).float().numpy())
    assert np.array_equal(got[finite], want[finite])
    assert bad == size - int(finite.sum())
    assert not np.isfinite(bits_to_tensor(got.copy(), out).float().numpy()[~finite]).any()


def test_every_bf16_pattern_survives() -> None:
    """A weight of 1 gives each of the 65,536 patterns back (NaNs as one quiet NaN, as torch casts them)."""
    every = np.arange(1 << 16, dtype="u2")
    got, bad = fused.weighted_sum(WeightedSum((1.0,)), [every], None, "bfloat16")
    nan = ((every & 0x7F80) == 0x7F80) & ((every & 0x7F) != 0)
    assert np.array_equal(got[~nan], every[~nan])
    assert bad == int(nan.sum()) + 2


def test_rounding_is_to_even() -> None:
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], "u4")  # the last rounds up to Inf
    got, bad = fused.weighted_sum(WeightedSum((1.0,)), [halfway], None, "bfloat16")
    assert got.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80]
    assert bad == 1


@pytest.mark.parametrize("variable", ["WEIGHTSMITH_KERNELS"])
def test_everything_works_without_kernels(variable: str) -> None:
    code = (
        "import torch, weightsmith; from weightsmith.ops import fused; assert not fused.available();"
        "a, b = ({'w': torch.tensor(v, dtype=torch.bfloat16)} for v in ([1.0, 3.0], [3.0, 5.0]));"
        "print(weightsmith.merge([a, b], 'linear')['w'].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, variable: "0"}
    )
    assert done.stdout.strip() == "[2.0, 4.0]"
