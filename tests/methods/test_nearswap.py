"""NearSwap: closed forms."""

from __future__ import annotations

import torch
from driver import every, merge


def test_near_entries_are_swapped_and_far_ones_move_by_t():
    base, other = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]), torch.tensor([1.05, 0.95, 3.0, -1.0, 1.0])

    def at(t: float) -> list[float]:
        return merge({"e": {"w": other}}, "nearswap", base={"w": base}, t=t, cut=every(2))["w"].tolist()

    assert torch.allclose(torch.tensor(at(0.1)), torch.tensor([1.05, 0.95, 1.1, 0.9, 1.0]))
    assert at(0.0) == base.tolist()
    assert torch.allclose(torch.tensor(at(10.0)), other)
    # w b + (1 - w) a with w = min(t / |b - a|, 1)
    share = (0.03 / (other - base).abs().clamp(min=1e-6)).clamp(max=1)
    assert torch.allclose(torch.tensor(at(0.03)), share * other + (1 - share) * base)
