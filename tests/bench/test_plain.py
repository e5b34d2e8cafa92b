"""The plain ways that methods are timed against compute what the methods compute, or a ratio would say nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench.methods import case, main
from bench.plain import PLAIN

from weightsmith.method import registered

RANDOM = {"dare", "della"}
"""Other draws: the shares of what is kept are compared."""

OTHER = {"tsvc": "a codec: its parts are no merged matrix", "r_tsvm": "the plain way is that of tsvm"}


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_plain_way_computes_the_same(name: str) -> None:
    one = case(registered()[name], 24, 4)
    one = replace(one, deltas=one.deltas * 300)  # beside a base of 1: small changes would drown in rounding
    plain = one.plain()
    assert plain is not None
    found = plain()
    (base,) = one.base.values()
    assert found.shape == base.shape
    if name in OTHER:
        return
    (merged,) = one.planned()().values()
    change = (merged - base).norm()
    if name in RANDOM:
        assert float((found - base).norm() / change) == pytest.approx(1, abs=0.2)
    else:
        assert float((found - merged).norm() / change) < 1e-3


def test_every_method_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--side", "16", "--repeat", "1", "--experts", "3"]) == 0
    table = capsys.readouterr().out.split("\n\n")[1]
    assert {line.split("|")[1].strip() for line in table.splitlines()[2:]} == registered().keys() - {"keep"}
