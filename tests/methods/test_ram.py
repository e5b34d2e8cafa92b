"""RAM and RAM+: closed forms."""

from __future__ import annotations

import pytest
import torch
from driver import every, merge
from torch import Tensor

A = torch.tensor([[1.0, 2.0, 0.0, 1e-3], [4.0, 0.0, 0.0, 1.0]])
B = torch.tensor([[0.0, 4.0, 0.0, 1.0], [2.0, 5.0, 0.0, -1.0]])


def run(method: str, **parameters) -> Tensor:
    base = {"w": torch.zeros(2, 4)}
    return merge({"a": {"w": A}, "b": {"w": B}}, method, base=base, cut=every(1), **parameters)["w"]


def test_lone_changes_stay_and_shared_ones_are_averaged():
    assert run("ram", epsilon=0.01).tolist() == [[1.0, 3.0, 0.0, 1.0], [3.0, 5.0, 0.0, 0.0]]
    shared = run("ram", epsilon=1e-4)
    assert float(shared[0, 3]) == pytest.approx((1e-3 + 1) / 2)
    assert run("ram", epsilon=0.0)[0, 2] == 0


def test_lone_changes_grow_by_the_share_of_shared_ones():
    """a changed 1 alone and 3 with b; b changed 2 alone."""
    got = run("ramplus_tl", epsilon=0.01, r=0.5, alpha=10.0)
    assert float(got[0, 0]) == pytest.approx(1 * (1 + 0.5 * 3))
    assert float(got[0, 3]) == pytest.approx(1 * (1 + 0.5 * 1.5))
    assert float(got[1, 1]) == pytest.approx(5 * (1 + 0.5 * 1.5))
    assert got[1, 0] == 3.0
    capped = run("ramplus_tl", epsilon=0.01, r=0.5, alpha=0.2)
    assert float(capped[0, 0]) == pytest.approx(1.1)
    assert torch.equal(run("ramplus_tl", epsilon=0.01, r=0.0), run("ram", epsilon=0.01))


def test_nothing_changed():
    base = {"w": torch.ones(2, 2)}
    for method in ("ram", "ramplus_tl"):
        assert torch.equal(merge({"a": base, "b": base}, method, base=base)["w"], base["w"])
