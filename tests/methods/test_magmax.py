"""MagMax and EMR's election: closed forms."""

from __future__ import annotations

import torch
from driver import every, merge

A = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, -1.0, 2.0]])
B = torch.tensor([[-3.0, -1.0, 0.25, -3.0], [0.0, -1.0, -4.0, 2.0]])
C = torch.tensor([[2.5, 0.0, -0.5, 1.0], [0.0, 0.0, 3.5, 1.0]])


def run(method: str, **parameters) -> list[list[float]]:
    models = {"a": {"w": A}, "b": {"w": B}, "c": {"w": C}}
    return merge(models, method, base={"w": torch.zeros(2, 4)}, cut=every(1), **parameters)["w"].tolist()


def test_magmax_takes_the_largest_change():
    assert run("magmax") == [[-3.0, -2.0, 0.5, 3.0], [0.0, 1.0, -4.0, 2.0]]
    assert run("magmax", **{"lambda": 0.5})[0] == [-1.5, -1.0, 0.25, 1.5]


def test_emr_takes_the_largest_change_of_the_elected_sign():
    assert run("emr") == [[2.5, -2.0, 0.5, 3.0], [0.0, 0.0, -4.0, 2.0]]
    assert run("emr", **{"lambda": 2.0})[0] == [5.0, -4.0, 1.0, 6.0]
