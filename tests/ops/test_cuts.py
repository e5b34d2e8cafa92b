"""Cuts by magnitude: each way to find them is exact, whatever the values, and equals what torch finds."""

from __future__ import annotations

import itertools
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.driver import Given
from ops.test_fused import stored_of
from weightsmith.core.keys import Key
from weightsmith.core.pass_ import fold, measured
from weightsmith.core.site import Site
from weightsmith.kernels import cuts
from weightsmith.kernels.cuts import Entries, tensor_cuts
from weightsmith.kernels.job import Job
from weightsmith.kernels.stored import Stored


def by_torch(deltas: torch.Tensor, ranks: list[list[int]]) -> np.ndarray:
    """The meaning: the looks of `select.Cut`."""
    site = Site(Key("w", tuple(deltas.shape[1:]), "float32"), deltas, is_delta=True)
    found = measured(Given(False, tuple(map(tuple, ranks))), lambda look: fold([look.see(site)]))
    return np.stack([found.threshold, found.quota, found.ties], -1)


def entries(stored: Stored, blocks: list[tuple[int, int]]) -> Entries:
    """The task vectors as they are."""
    count = len(stored.experts)
    return Entries(stored.shape, lambda a, b: stored[a:b], blocks, lambda: Job((), count, {}, ()))


def made(seed: int, kind: str, shape: tuple[int, int, int]) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=draw)
    if kind == "few values":
        values = values.round()
    if kind == "mostly zero":
        values[1:] = torch.where(torch.rand(values[1:].shape, generator=draw) < 0.9, values[0], values[1:])
    if kind == "many sizes":
        values *= 10.0 ** torch.randint(-30, 30, shape, generator=draw)
    return values


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([1, 3, 60]),
    width=st.sampled_from([1, 5, 130]),
    kind=st.sampled_from(["smooth", "few values", "mostly zero", "many sizes"]),
    shares=st.lists(st.lists(st.floats(-0.1, 1.1), min_size=3, max_size=3), min_size=1, max_size=3),
    wanted=st.integers(1, 3),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    blocks=st.integers(1, 3),
    sample=st.sampled_from([0, 64, 1 << 16]),
)
def test_cuts_are_those_of_torch(
    seed: int,
    rows: int,
    width: int,
    kind: str,
    shares: list[list[float]],
    wanted: int,
    dtype: str,
    blocks: int,
    sample: int,
) -> None:
    """Small tensors are sorted, one cut is guessed, several are counted: `sample` decides what is small."""
    stored = stored_of(made(seed, kind, (len(shares) + 1, rows, width)), [dtype] * (len(shares) + 1))
    ranks = [[round(share * rows * width) for share in of[:wanted]] for of in shares]
    edges = sorted({0, rows, *(at * rows // blocks for at in range(blocks))})
    with patch.object(cuts, "SAMPLE", sample):
        found = tensor_cuts(ranks, entries(stored, list(itertools.pairwise(edges))))
    assert np.array_equal(found, by_torch(deltas_of(stored, dtype), ranks))


def deltas_of(stored: Stored, dtype: str) -> torch.Tensor:
    kind = getattr(torch, dtype)
    assert stored.base is not None
    base, *experts = (torch.from_numpy(bits).view(kind).float() for bits in (stored.base, *stored.experts))
    return torch.stack([one - base for one in experts])


def test_any_number_of_cuts_takes_two_passes() -> None:
    """Neither 2 nor 40 cuts need a guess, or more passes; equal ones may be asked for twice."""
    stored = stored_of(made(0, "smooth", (3, 300, 300)), ["float32"] * 3)
    blocks, seen = [(0, 100), (100, 300)], []

    def read(start: int, stop: int) -> Stored:
        seen.append((start, stop))
        return stored[start:stop]

    for count in (2, 40):
        seen.clear()
        ranks = [[1 + 2000 * at for at in range(count)] * 2] * 2
        found = tensor_cuts(ranks, replace(entries(stored, blocks), read=read))
        assert seen == blocks * 2
        assert np.array_equal(found, by_torch(deltas_of(stored, "float32"), ranks))


def test_cells_add_up_to_all_entries() -> None:
    stored = stored_of(made(1, "smooth", (2, 50, 40)), ["float32"] * 2)
    bits = deltas_of(stored, "float32").abs().view(torch.int32).flatten().numpy()
    cells, often = np.unique(bits >> 16, return_counts=True)
    first, second = (int(cell) for cell in cells[np.argsort(often)[-2:]])
    found = cuts._counted([[first, second, -1, 1 << 15]], entries(stored, [(0, 20), (20, 50)]))
    for cell in (first, second):
        here = bits[bits >> 16 == cell] & 0xFFFF
        assert np.array_equal(found.low([cell])[0, 0], np.bincount(here, minlength=1 << 16))
    assert not found.low([-1]).any()
    closed = cuts._counted([()], entries(stored, [(0, 50)])).high
    assert np.array_equal(closed[0], np.bincount(bits >> 16, minlength=1 << 15))
