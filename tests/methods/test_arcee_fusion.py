"""Arcee Fusion: closed forms."""

from __future__ import annotations

import pytest
import torch
from driver import every, merge
from torch import Tensor

from kit import noise, refusal
from weightsmith.methods.arcee_fusion import ArceeFusion


def fuse(base: Tensor, expert: Tensor, step: int = 3) -> Tensor:
    return merge({"e": {"w": expert}}, "arcee_fusion", base={"w": base}, cut=every(step))["w"]


@pytest.mark.parametrize("shape", [(31, 8), (9, 4, 5), (200,)])
def test_what_stands_out_is_taken_over(shape):
    base = noise(*shape, seed=0)
    expert = base + 0.1 * noise(*shape, seed=1) ** 3
    p, q = (x.double().softmax(-1) + 1e-8 for x in (expert, base))
    importance = (expert - base).double().abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    rising = importance.flatten().sort().values
    first, middle, third = (rising[int(x * (len(rising) - 1))] for x in (0.25, 0.5, 0.75))
    wanted = importance >= middle + 1.5 * (third - first)
    got = fuse(base, expert)
    assert torch.equal(got != base, wanted)
    assert torch.allclose(got, torch.where(wanted, expert, base), atol=1e-6)
    assert 0 < int(wanted.sum()) < wanted.numel() / 2


def test_scaling_a_vector_changes_nothing_in_what_is_taken():
    base, change = torch.zeros(101), noise(101, seed=2) ** 3
    taken = fuse(base, change) != 0
    assert torch.equal(fuse(base, change * 1e-6) != 0, taken)


def test_equal_changes_are_all_taken_and_numbers_too():
    assert torch.equal(fuse(torch.zeros(6), torch.ones(6)), torch.ones(6))
    assert float(fuse(torch.tensor(1.0), torch.tensor(3.0))) == 3.0


def test_a_base_is_needed():
    assert "base" in str(refusal(ArceeFusion(), 1, has_base=False))
