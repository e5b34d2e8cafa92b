"""The plain ways that methods are timed against compute what the methods compute, or a ratio would say nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from bench.methods import case, main
from bench.plain import PLAIN
from torch import Tensor

import weightsmith
from weightsmith.core.method import Codec, registered

RANDOM = {"dare", "della", "randes"}
"""Other draws: the sizes are compared."""

OTHER = {"r_tsvm": "the plain way is that of tsvm"}

STEPS = {"doge": 0.02, "optmerge": 0.01, "wudi": 0.01}
"""Methods that go a small way from a known start, and by which share of that way rounding in float32 leads astray."""


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_plain_way_computes_the_same(name: str) -> None:
    cls = registered()[name]
    one = case(cls, 24, 4)
    if name in STEPS:  # steps have a fixed length: beside a base, or large task vectors, they would not be seen
        one = replace(one, base={key: torch.zeros_like(tensor) for key, tensor in one.base.items()})
    else:
        one = replace(one, deltas=one.deltas * 300)  # beside a base of 1: small changes would drown in rounding
    plain = one.plain()
    assert plain is not None
    found = plain()
    (base,) = one.base.values()
    assert found.shape == base.shape
    if name in OTHER:
        return
    made = one.planned()()
    merged = rebuilt(cls(), made, base, len(one.deltas)) if issubclass(cls, Codec) else next(iter(made.values()))
    change = (merged - base).norm()
    if name in RANDOM:
        assert float((found - base).norm() / change) == pytest.approx(1, abs=0.2)
    elif name in STEPS:
        (start,) = weightsmith.merge(
            {f"e{i}": {"w": delta} for i, delta in enumerate(one.deltas)}, cls(iters=0), {"w": base}
        ).values()
        way = (merged - start).norm()
        assert float(way) > 1e-3 * float(change)
        assert float((found - merged).norm() / way) < STEPS[name]
    else:
        assert float((found - merged).norm() / change) < 1e-3


def rebuilt(codec: Codec, made: Mapping[str, Tensor], base: Tensor, count: int) -> Tensor:
    """The mean of all experts that come back from what a codec stored of one tensor."""
    experts = []
    for expert in (f"e{i}" for i in range(count)):
        parts = {}
        for name, value in made.items():
            part = name.partition("::")[2]
            own, _, whose = part.rpartition(".")
            if whose == expert:
                parts[own] = value
            elif not re.fullmatch(r"e\d+", whose):
                parts[part] = value
        experts.append(codec.decode(parts, base, 0))
    return torch.stack(experts).mean(0)


def test_every_method_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--side", "16", "--large", "0", "--repeat", "1", "--experts", "3"]) == 0
    table = capsys.readouterr().out.split("\n\n")[1]
    assert {line.split("|")[1].strip() for line in table.splitlines()[2:]} == registered().keys() - {"keep"}


def test_a_ratio_is_also_taken_on_large_matrices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["emr", "opcm", "--side", "16", "--large", "20", "--repeat", "1"]) == 0
    emr, opcm = (line.split("|")[-2].strip() for line in capsys.readouterr().out.splitlines()[-2:])
    assert float(emr) > 0
    assert opcm == "-"  # a decomposition: its cost grows with the side
