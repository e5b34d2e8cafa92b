"""Figures of task vectors made by hand, against what they must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from inspected import of, of_vectors

from weightsmith.core.keys import Key
from weightsmith.core.pass_ import Pass, fold, measured
from weightsmith.core.site import Site
from weightsmith.inspect.facts import independent
from weightsmith.inspect.survey import survey

torch.set_num_threads(1)


def test_norms_and_angles() -> None:
    model = of_vectors([0.0, 0.0, 10.0], [3.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, -2.0, 0.0], [0.0, 0.0, 1.0]).model
    assert model.norm == pytest.approx((3, 5, 2, 1))
    assert model.relative == pytest.approx((0.3, 0.5, 0.2, 0.1))
    assert model.size == pytest.approx((3, 3.5, 2, 1))
    assert model.cosine[0] == pytest.approx((1, 0.6, 0, 0))
    assert model.cosine[1] == pytest.approx((0.6, 1, -0.8, 0))
    assert model.base_cosine == pytest.approx((0, 0, 0, 1))
    assert model.zeros == pytest.approx((2 / 3, 1 / 3, 2 / 3, 2 / 3))
    # The sum is (6, 2, 1), the mean length 11/4.
    assert model.to_one == pytest.approx(11 / 4 / math.sqrt(41))
    assert (model.tensors, model.entries, model.spectra) == (1, 3, None)


def test_sign_conflict_plain_and_weighted() -> None:
    """Entries: both up; opposite, 1 against 3; only one moved; three experts, +2 +1 -4; none moved."""
    model = of_vectors(
        [0.0] * 5, [1.0, 1.0, 9.0, 2.0, 0.0], [1.0, -3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, -4.0, 0.0]
    ).model
    assert model.conflict == pytest.approx(2 / 3)  # of the three that several changed
    assert model.outvoted == pytest.approx((1 + 3) / (13 + 5 + 4))


def test_opposite_experts_lose_half_and_equal_ones_nothing() -> None:
    opposite = of_vectors([1.0] * 4, [1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.0]).model
    assert (opposite.conflict, opposite.outvoted, opposite.to_one) == (1, 0.5, None)
    assert opposite.cosine[0][1] == pytest.approx(-1)
    equal = of_vectors([1.0] * 4, [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]).model
    assert (equal.conflict, equal.outvoted, equal.overlap[0][1]) == (0, 0, 1)
    assert equal.to_one == pytest.approx(0.5)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_independent_task_vectors(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    deltas = [{"w": torch.randn(300, 100, generator=generator)} for _ in range(count)]
    model = of({"w": torch.zeros(300, 100)}, deltas, spectra=0).model
    assert model.outvoted == pytest.approx(independent([1.0] * count, [1.0] * count), rel=0.02)
    assert model.conflict == pytest.approx(1 - 2 ** (1 - count), rel=0.02)
    assert model.overlap[0][1] == pytest.approx(0.2 / 1.8, rel=0.05)
    assert model.peak[0] == pytest.approx(0.0127, rel=0.1)
    assert model.to_one == pytest.approx(count**-0.5, rel=0.02)


@pytest.mark.parametrize("scales", [(1.0, 3.3), (1.0, 2.0, 8.0), (1.0,) * 13])
@pytest.mark.parametrize("kept", [1.0, 0.3])
def test_the_yardstick_knows_norms_and_zeros(scales: tuple[float, ...], kept: float) -> None:
    generator = torch.Generator().manual_seed(1)
    deltas = [{n: s * torch.randn(200, 100, generator=generator) * (torch.rand(200, 100, generator=generator) < kept)
               for n, s in (("a", scale), ("b", 5 / scale))} for scale in scales]  # fmt: skip
    model = of({n: torch.zeros(200, 100) for n in "ab"}, deltas, spectra=0).model
    assert model.outvoted == pytest.approx(model.chance, rel=0.03)


def test_two_of_unequal_norms_outvote_less() -> None:
    assert independent([1.0, 3.3], [1.0, 1.0]) == pytest.approx(0.099, abs=5e-4)
    assert independent([1.0, 0.0], [1.0, 1.0]) == independent([1.0, 1.0], [0.0, 0.0]) == 0


def test_overlap_of_top_masks() -> None:
    """Two of ten entries each, one in common: 1 / 3.  Equals go by lower index, zeros are in no mask."""
    first, second = [0.0] * 10, [0.0] * 10
    first[3], first[7], second[7], second[9] = 5.0, -4.0, 3.0, 2.0
    assert of_vectors([1.0] * 10, first, second).model.overlap[0][1] == pytest.approx(1 / 3)
    ties = of_vectors([0.0] * 10, [1.0] * 10, [0.0, 1.0, *[0.5] * 8]).model
    assert ties.overlap[0][1] == pytest.approx(1 / 3)  # {0, 1} and {1, 2}
    sparse = of_vectors([0.0] * 10, [1.0, *[0.0] * 9], [0.0] * 9 + [1.0]).model
    assert sparse.overlap == ((1, 0), (0, 1))
    still = of_vectors([1.0] * 10, [0.0] * 10, first).model
    assert still.overlap[0] == (None, 0)
    assert still.cosine[0] == (None, None)


def test_outliers_and_the_peak() -> None:
    delta = torch.ones(2000)
    delta[::2] = -1
    delta[17], delta[18] = 100.0, -10.0
    model = of({"w": torch.ones(2000)}, [{"w": delta}]).model
    squares = 1998 + 100**2 + 10**2
    assert model.outliers == (pytest.approx(1 / 2000),)  # 6 rms is 14.8
    assert model.peak == (pytest.approx((100**2 + 10**2) / squares),)
    assert (model.conflict, model.outvoted, model.cosine[0]) == (None, 0, (pytest.approx(1),))


def test_groups_are_taken_as_one_vector() -> None:
    shapes = {
        "embed_tokens.weight": (6, 4),
        "layers.10.q_proj.weight": (4, 4),
        "layers.2.q_proj.weight": (4, 4),
        "layers.2.up_proj.weight": (8, 4),
        "norm.weight": (4,),
        "scale": (),
    }
    generator = torch.Generator().manual_seed(0)
    base, *deltas = ({n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(3))
    found = of(base, deltas)
    assert list(found.layers) == ["embed", "2", "10", "norm", "other"]
    assert list(found.roles) == ["embed", "norm", "q", "up", "other"]
    assert list(found.cells["2"]) == ["q", "up"]

    def check(measures: object, names: Sequence[str]) -> None:
        a, b = (torch.cat([d[n].reshape(-1) for n in names]) for d in deltas)
        assert measures.norm == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-5)  # type: ignore[attr-defined]
        cosine = float(torch.nn.functional.cosine_similarity(a, b, 0))
        assert measures.cosine[0][1] == pytest.approx(cosine, abs=1e-5)  # type: ignore[attr-defined]
        assert measures.tensors == len(names)  # type: ignore[attr-defined]

    check(found.model, list(shapes))
    check(found.layers["2"], ["layers.2.q_proj.weight", "layers.2.up_proj.weight"])
    check(found.roles["q"], ["layers.10.q_proj.weight", "layers.2.q_proj.weight"])
    check(found.tensors["scale"], ["scale"])
    assert (
        found.model.entries
        == sum(m.entries for m in found.layers.values())
        == sum(map(len, map(torch.flatten, base.values())))
    )


def surveyed(base: torch.Tensor, stack: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    """All passes of the survey over blocks of `step` rows."""
    key, lows = Key("w", tuple(base.shape), "float32"), range(0, base.shape[0], step)
    found: dict[Pass[Any], Any] = {}
    for asked in survey(len(stack)):
        sites = [Site(key, stack[:, i : i + step], base[i : i + step], start=i, found=found) for i in lows]
        found[asked] = measured(asked, lambda look, sites=sites: fold(map(look.see, sites)))
    return {n: torch.as_tensor(v) for one in found.values() if isinstance(one, dict) for n, v in one.items()}


@pytest.mark.parametrize("step", [9, 32, 64])
@pytest.mark.parametrize("rounded", [False, True])
def test_cuts_do_not_matter(step: int, rounded: bool) -> None:
    """Integers are equal, sums up to rounding in float64; `rounded`: with many equal magnitudes at the cuts."""
    generator = torch.Generator().manual_seed(1)
    base, stack = torch.randn(70, 30, generator=generator), torch.randn(3, 70, 30, generator=generator)
    if rounded:
        base, stack = base.mul(2).round(), stack.mul(2).round()
    whole, cut = surveyed(base, stack, 70), surveyed(base, stack, step)
    assert whole.keys() == cut.keys() == {
        "gram", "mass", "outvoted", "zeros", "shared", "clash", "masks", "outliers", "peak"
    }  # fmt: skip
    for name, value in whole.items():
        if value.is_floating_point():
            torch.testing.assert_close(cut[name], value, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(cut[name], value), name
    assert (whole["masks"].diagonal() == 420).all() or rounded
