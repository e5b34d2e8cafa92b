"""Outputs of the reference implementations, each within the tolerance that its file states."""

from __future__ import annotations

import pytest
import torch

from goldens.adapters import ADAPTERS, NOT_YET, Case, cases, folders
from goldens.forms import FORMS, Form
from goldens.mergekit import METHODS
from weightsmith.recipe import mergekit_methods

CASES = cases()


def test_every_case_is_run_or_listed():
    unknown = sorted({c.method for c in CASES} - set(ADAPTERS) - set(NOT_YET))
    assert not unknown, f"golden cases of unknown methods: {unknown}"
    assert not set(ADAPTERS) & set(NOT_YET), "built methods must leave the table of those that are not yet"
    for folder in folders():
        assert any(folder.glob("*.safetensors")), f"no golden cases in {folder}"
    unused = set(ADAPTERS) - {c.method for c in CASES} - {f.method for f in FORMS}
    assert not unused, f"adapters that no case and no form uses: {sorted(unused)}"
    assert set(METHODS) == set(mergekit_methods.METHODS), "every one of mergekit's methods has an adapter"


@pytest.mark.parametrize("form", [pytest.param(f, id=f.label) for f in FORMS])
def test_form(form: Form):
    """What the reference code spells in another way, against its formula written out."""
    got, expected = ADAPTERS[form.method](form), form.expected
    assert set(got) == set(expected)
    for name, want in expected.items():
        torch.testing.assert_close(
            got[name].double(), want, rtol=1e-4, atol=form.atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", [pytest.param(c, id=c.path.stem) for c in CASES if c.method in ADAPTERS])
def test_golden(case: Case):
    got, expected = ADAPTERS[case.method](case), case.expected
    assert set(got) == set(expected)
    rtol, atol = float(case.meta["rtol"]), float(case.meta["atol"])
    outside, total, worst = 0, 0, ("", 0.0)
    for name, want in expected.items():
        assert got[name].shape == want.shape, name
        assert got[name].dtype == want.dtype, name
        error = (got[name].double() - want.double()).abs()
        outside += int((~(error <= atol + rtol * want.double().abs())).sum())
        total += want.numel()
        if error.numel() and float(error.max()) > worst[1]:
            worst = (name, float(error.max()))
    allowed = float(case.meta.get("mismatch_fraction", 0)) * total
    assert outside <= allowed, f"{outside} of {total} entries outside, worst {worst[1]:.3g} in {worst[0]}"


def test_a_wrong_result_is_noticed():
    case = next(c for c in CASES if c.path.stem == "ties-0")
    nudged = {n: t.clone() for n, t in case.expected.items()}
    nudged["model.norm.weight"][0] += 1e-4
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADAPTERS, "ties", lambda _: nudged)  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match=r"1 of \d+ entries outside, worst 0.0001 in model\.norm"):
            test_golden(case)
    assert torch.equal(case.expected["model.norm.weight"][1:], nudged["model.norm.weight"][1:])
