"""The fused kernels give the bytes that the torch path gives."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.core.kernel import Program, WeightedSum
from weightsmith.core.keys import Key
from weightsmith.core.pass_ import Pass, fold, measured
from weightsmith.core.site import Site
from weightsmith.io.read.source import bits_to_tensor
from weightsmith.kernels import native
from weightsmith.kernels.cuts import Entries, tensor_cuts
from weightsmith.kernels.job import Job
from weightsmith.kernels.merge import Merge, merged, weighted_sum
from weightsmith.kernels.record import SIGNATURES, STRIP
from weightsmith.kernels.stored import READ, WRITTEN, Stored
from weightsmith.methods.ties import Ties
from weightsmith.ops.combine import apply_weighted_sum

DTYPES = tuple(READ)
WORDS = {"bfloat16": ("u2", 0x7F80), "float16": ("u2", 0x7C00), "float32": ("u4", 0x7F800000)}
WORDS |= {"float8_e4m3fn": ("u1", 0x78), "float8_e5m2": ("u1", 0x7C)}


def by_torch(spec: WeightedSum, inputs: list[np.ndarray], base: np.ndarray, dtypes: list[str], out: str) -> np.ndarray:
    """The meaning: what the engine's torch path computes."""
    stack = torch.stack([bits_to_tensor(x, d).float() for x, d in zip(inputs, dtypes[1:], strict=True)])
    site = Site(Key("w", tuple(stack.shape[1:]), out), stack, bits_to_tensor(base, dtypes[0]).float())
    result = apply_weighted_sum(spec, site).to(getattr(torch, out))
    return result.view(torch.uint32 if out == "float32" else torch.uint16).numpy()


def random_bits(rng: np.random.Generator, dtype: str, size: int, *, finite: bool = True) -> np.ndarray:
    """Any finite pattern: denormals, signed zeros, huge and tiny values."""
    width, exponent = WORDS[dtype]
    bits = rng.integers(0, np.iinfo(width).max, size, width, endpoint=True)
    if finite:
        bits[(bits & exponent) == exponent] &= ~np.array(exponent >> 1, width)
    return bits


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([0, 1, 2, 7, 33, 1000, STRIP - 1, STRIP, STRIP + 5]),
    weights=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4),
    divisor=st.sampled_from([1.0, 3.0, 0.7]),
    scale=st.sampled_from([1.0, 0.3, -1.5]),
    deltas=st.booleans(),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    out=st.sampled_from(tuple(WRITTEN)),
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
    got, bad = weighted_sum(spec, Stored(inputs, dtypes[1:], base, dtypes[0]), out)
    want = by_torch(spec, inputs, base, dtypes, out)
    finite = np.isfinite(bits_to_tensor(want.copy(), out).float().numpy())
    assert np.array_equal(got[finite], want[finite])
    assert bad == size - int(finite.sum())
    assert not np.isfinite(bits_to_tensor(got.copy(), out).float().numpy()[~finite]).any()
    # Several in one go, into arrays at hand or of their own, are what each is alone.
    others = [
        WeightedSum(tuple(reversed(weights)), 1.0, 0.5, deltas),
        WeightedSum(tuple(weights), 0.3, 1.0, not deltas),
    ]
    stored, room = Stored(inputs, dtypes[1:], base, dtypes[0]), np.full_like(got, 7)
    specs = [spec, *others, spec]
    many = merged([Merge(Program(one), {}) for one in specs], stored, out, 0, [None, None, None, room])
    assert many[3][0] is room
    for one, (made, count) in zip(specs, many, strict=True):
        alone, wrong = weighted_sum(one, stored, out)
        assert np.array_equal(made, alone)
        assert count == wrong


def test_every_bf16_pattern_survives() -> None:
    """A weight of 1 gives each of the 65,536 patterns back (NaNs as one quiet NaN, as torch casts them)."""
    every = np.arange(1 << 16, dtype="u2")
    got, bad = weighted_sum(WeightedSum((1.0,)), Stored([every], ["bfloat16"]), "bfloat16")
    nan = ((every & 0x7F80) == 0x7F80) & ((every & 0x7F) != 0)
    assert np.array_equal(got[~nan], every[~nan])
    assert bad == int(nan.sum()) + 2


def test_rounding_is_to_even() -> None:
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], "u4")  # the last rounds up to Inf
    got, bad = weighted_sum(WeightedSum((1.0,)), Stored([halfway], ["float32"]), "bfloat16")
    assert got.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80]
    assert bad == 1


@pytest.mark.parametrize("dtype", [name for name in DTYPES if WORDS[name][0] != "u4"])
def test_every_short_pattern_is_read_as_torch_reads_it(dtype: str) -> None:
    width, _ = WORDS[dtype]
    every = np.arange(np.iinfo(width).max + 1, dtype=width)
    got, _ = weighted_sum(WeightedSum((1.0,)), Stored([every], [dtype]), "float32")
    want = bits_to_tensor(every.copy(), dtype).float().view(torch.uint32).numpy()
    nan = np.isnan(want.view("f4"))
    assert np.array_equal(got[~nan], want[~nan])
    assert np.isnan(got.view("f4")[nan]).all()


def test_every_half_is_written_as_torch_writes_it() -> None:
    """All numbers near and between halves: every half, its neighbours in float32, and every midpoint."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    halves = halves[halves.isfinite()]
    midpoints = (halves + torch.roll(halves, -1)) / 2
    inf = torch.tensor(float("inf"))
    values = torch.cat([x for v in (halves, midpoints) for x in (v, torch.nextafter(v, inf), torch.nextafter(v, -inf))])
    got, bad = weighted_sum(WeightedSum((1.0,)), Stored([values.view(torch.uint32).numpy()], ["float32"]), "float16")
    want = values.half()
    assert np.array_equal(got, want.view(torch.uint16).numpy())
    assert bad == int((~want.isfinite()).sum())


def stored_of(values: torch.Tensor, dtypes: list[str]) -> Stored:
    """values: [1 + n, rows, width], the base first -> as stored in `dtypes`."""
    kinds = {"float32": torch.uint32}
    bits = [
        v.to(getattr(torch, d)).view(kinds.get(d, torch.uint16)).numpy() for v, d in zip(values, dtypes, strict=True)
    ]
    return Stored(bits[1:], dtypes[1:], bits[0], dtypes[0])


def site_of(stored: Stored, found: dict[Pass[Any], Any] | None = None, start: int = 0) -> Site:
    stack = torch.stack([bits_to_tensor(b, d).float() for b, d in zip(stored.experts, stored.dtypes, strict=True)])
    assert stored.base is not None
    base = bits_to_tensor(stored.base, stored.base_dtype).float()
    return Site(Key("w", tuple(base.shape), "float32"), stack, base, found=found or {}, start=start)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([1, 3, 40, 700]),
    width=st.sampled_from([1, 5, 130, 513]),
    kind=st.sampled_from(["smooth", "few values", "mostly zero", "one row large"]),
    densities=st.lists(st.sampled_from([0.001, 0.2, 0.5, 0.9, 1.0]), min_size=1, max_size=3),
    zero_sign=st.sampled_from(["plus", "majority", "minority"]),
    aggregate=st.sampled_from(["mean", "sum"]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    blocks=st.integers(1, 4),
)
def test_vote_equals_torch(
    seed: int,
    rows: int,
    width: int,
    kind: str,
    densities: list[float],
    zero_sign: str,
    aggregate: str,
    dtype: str,
    blocks: int,
) -> None:
    """Cuts and votes of the kernels are those of `Ties`, measured and merged in torch."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(len(densities) + 1, rows, width, generator=draw)
    if kind == "few values":
        values = values.round()
    if kind == "mostly zero":
        values[1:] = torch.where(torch.rand(values[1:].shape, generator=draw) < 0.9, values[0], values[1:])
    if kind == "one row large":
        values[:, -1] *= 1e6
    stored = stored_of(values, [dtype] * len(values))
    method = Ties(
        density=tuple(densities), weight=tuple(0.3 + i for i in range(len(densities))), lambda_=0.7,
        scope_="tensor", zero_sign=zero_sign, aggregate=aggregate,
    )  # fmt: skip
    spec = method.fused(len(densities))
    assert spec is not None
    program = Program(spec)
    found: dict[Pass[Any], Any] = {}
    for asked in method.passes(len(densities)):
        found[asked] = measured(asked, lambda look: fold([look.see(site_of(stored, found))]))
    edges = sorted({0, rows, *(at * rows // blocks for at in range(blocks))})
    ranges = list(itertools.pairwise(edges))
    if spec.cut is not None:
        want = found[spec.cut]
        ranked = Entries((rows, width), lambda a, b: stored[a:b], ranges, lambda: Job((), len(densities), {}, ()))
        cuts = tensor_cuts(spec.cut.ranks(rows * width), ranked)
        assert np.array_equal(cuts, np.stack([want.threshold, want.quota, want.ties], -1))
    if spec.signs is not None:
        signs = Merge(program, {0: {one: value for one, value in found.items() if one != spec.signs}})
        assert sum(signs.count_signs(stored[a:b], a * width) for a, b in ranges) == 0
        assert int(signs.signs) == found[spec.signs]
    vote = Merge(program, {0: found})
    got = np.concatenate([vote.merge(stored[a:b], "float32", a * width)[0] for a, b in ranges])
    want = method.merge(site_of(stored, found)).view(torch.uint32).numpy()
    assert np.array_equal(got.view("f4") + 0.0, want.view("f4") + 0.0)


def test_a_wrong_guess_costs_passes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightsmith.kernels.cuts.SAMPLE", 64)
    monkeypatch.setattr("weightsmith.kernels.cuts.MARGIN", 0.0)
    values = torch.randn(2, 4096, 16, generator=torch.Generator().manual_seed(0))
    values[1, ::64] *= 1e-3  # what the sample sees is unlike the rest
    stored = stored_of(values, ["float32", "float32"])
    ranks = [[int(0.37 * 4096 * 16)]]
    passes = []

    def read(start: int, stop: int) -> Stored:
        passes.append((start, stop))
        return stored[start:stop]

    cuts = tensor_cuts(ranks, Entries((4096, 16), read, [(0, 4096)], lambda: Job((), 1, {}, ())))
    delta = (values[1] - values[0]).abs().flatten().sort(descending=True).values
    assert cuts[0, 0, 0] == int(delta[int(0.37 * delta.numel()) - 1].view(torch.int32))
    assert passes.count((0, 4096)) > 1


def test_kept_code_that_is_damaged_or_not_ours_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = {name: (f"f{i}", b"abc" + bytes(i)) for i, name in enumerate(SIGNATURES)}
    file = tmp_path / "kept"
    native._keep(file, code)
    assert native._read(file) == code
    file.chmod(0o666)
    assert native._read(file) is None  # others can write to it
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1])
    assert native._read(file) is None  # torn
    link = tmp_path / "link"
    native._keep(file, code)
    link.symlink_to(file)
    assert native._read(link) is None

    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("WEIGHTSMITH_CACHE", str(shared))
    assert native.cache_folder() != shared


@pytest.mark.parametrize("variable", ["WEIGHTSMITH_KERNELS"])
def test_everything_works_without_kernels(variable: str) -> None:
    code = (
        "import torch, weightsmith; from weightsmith.kernels.merge import available; assert not available();"
        "a, b = ({'w': torch.tensor(v, dtype=torch.bfloat16)} for v in ([1.0, 3.0], [3.0, 5.0]));"
        "print(weightsmith.merge([a, b], 'linear')['w'].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, variable: "0"}
    )
    assert done.stdout.strip() == "[2.0, 4.0]"


def test_the_loader_knows_all_that_the_kernels_name() -> None:
    """An unknown name would leave every other one, memset included, at address 0."""
    import re

    from weightsmith.kernels.compiled import KERNELS

    for name, kernel in KERNELS.items():
        named = set(re.findall(r"^declare .*?@(\w+)\(", kernel.inspect_llvm(), re.M))
        assert {n for n in named if not n.startswith("Py")} <= set(native._NEVER), name
