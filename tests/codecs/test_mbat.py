"""mbat against its predictions: what comes back, under which binder, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from goldens.encoded import encoded
from weightsmith.codecs.mbat import Mbat, predicted
from weightsmith.core.errors import PlanError
from weightsmith.jobs.compress import compress
from weightsmith.ops.binders import generator, haar, hadamard
from weightsmith.recipe.schema import Recipe

SIZE = 512
DRAW = torch.Generator().manual_seed(0)
BASE = {"w": torch.randn(SIZE, SIZE, generator=DRAW)}


def _dense() -> Tensor:
    return torch.randn(SIZE, SIZE, generator=DRAW)


def _low() -> Tensor:
    return torch.randn(SIZE, 4, generator=DRAW) @ torch.randn(4, SIZE, generator=DRAW)


def _sparse() -> Tensor:
    return _dense() * (torch.rand(SIZE, SIZE, generator=DRAW) < 0.01)


def _experts(count: int, make: Any) -> dict[str, dict[str, Tensor]]:
    changes = [make() for _ in range(count)]
    return {f"e{i}": {"w": BASE["w"] + 10 * t / t.norm()} for i, t in enumerate(changes)}


def _errors(codec: dict[str, Any], experts: dict[str, dict[str, Tensor]]) -> tuple[list[float], list[float]]:
    """Measured and predicted, of each expert."""
    made = encoded([{"mbat": codec}], BASE, experts)
    changes = [own["w"] - BASE["w"] for own in experts.values()]
    rows = [change.double().square().sum(1) for change in changes]
    back = [made.rebuilt("w", name, BASE["w"]) - BASE["w"] for name in experts]
    measured = [float((b - c).norm() / c.norm()) for b, c in zip(back, changes, strict=True)]
    total = torch.stack(rows).sum(0)
    return measured, [predicted(Mbat(**codec), c, total - r) for c, r in zip(changes, rows, strict=True)]


@pytest.mark.parametrize("binder", ["sign", "hadamard", "dense"])
def test_crosstalk_is_the_others_norm(binder: str) -> None:
    codec = {"binder": binder, "denoise": "none"}
    alone, _ = _errors(codec, _experts(1, _dense))
    assert alone[0] < 1e-6
    experts = _experts(2, _dense)
    for measured in (_errors(codec, experts)[0], _errors({**codec, "denoise": "shrink"}, experts)[0]):
        wanted = 1.0 if measured[0] > 0.9 else math.sqrt(0.5)
        assert measured == pytest.approx([wanted] * 2, rel=0.1)


@pytest.mark.parametrize("count", [3, 5])
def test_the_error_grows_as_the_root_of_the_others(count: int) -> None:
    """Refused as compression, measured all the same: sqrt(n - 1) within 10%."""
    codec = Mbat(denoise="none", binder="hadamard")
    deltas = [10 * t / t.norm() for t in (_dense() for _ in range(count))]
    added = sum(codec._bound(t, i, 0) for i, t in enumerate(deltas))
    assert isinstance(added, Tensor)
    for i, t in enumerate(deltas):
        error = float((codec._unbound(added, i, 0) - t).norm() / t.norm())
        assert error == pytest.approx(math.sqrt(count - 1), rel=0.1)


def test_low_ranks_come_back_through_signs_and_not_through_rotations() -> None:
    experts = _experts(4, _low)
    measured, foretold = _errors({"denoise": "lowrank", "rank": 4}, experts)
    assert max(measured) < 0.35
    assert measured == pytest.approx(foretold, rel=0.1)
    changes = [own["w"] - BASE["w"] for own in experts.values()]
    for binder in ("hadamard", "dense"):
        codec = Mbat(binder=binder)
        added = sum(codec._bound(t, i, 0) for i, t in enumerate(changes))
        back = codec._unbound(added, 0, 0)
        u, s, v = torch.linalg.svd(back)
        assert float(((u[:, :4] * s[:4]) @ v[:4] - changes[0]).norm() / changes[0].norm()) > 0.8


@pytest.mark.parametrize("binder", ["hadamard", "dense"])
def test_sparse_changes_come_back_above_the_noise(binder: str) -> None:
    measured, foretold = _errors({"binder": binder, "denoise": "sparse"}, _experts(4, _sparse))
    assert max(measured) < 0.5
    assert measured == pytest.approx(foretold, rel=0.1)


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        ({"denoise": "none"}, r"nothing is saved beyond 2 experts.*sqrt\(n - 1\)"),
        ({}, "nothing is saved beyond 2 experts"),
        ({"denoise": "sparse"}, "binder sign leaves foreign changes sparse"),
        ({"denoise": "lowrank", "binder": "dense"}, "binder dense keeps the others' singular values"),
    ],
)
def test_what_is_no_compression_is_refused(codec: dict[str, Any], said: str, tmp_path: Any) -> None:
    with pytest.raises(PlanError, match=said):
        encoded([{"mbat": codec}], BASE, _experts(3, _dense))


def test_predictions_are_said_beside_what_is_measured(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    for name, tensors in {"base": BASE, **_experts(4, _low)}.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    models = {f"e{i}": {"model": str(tmp_path / f"e{i}")} for i in range(4)}
    recipe = {"base": str(tmp_path / "base"), "models": models, "method": [{"mbat": {"denoise": "lowrank", "rank": 4}}]}
    made = compress(Recipe.model_validate(recipe), tmp_path / "packed")
    assert made.storage is not None
    said = next(str(w) for w in made.warnings if "mbat predicts to lose" in str(w))
    foretold = float(said.split("lose ")[1].split("%")[0]) / 100
    assert made.storage.error["e0"] == pytest.approx(foretold, rel=0.1)
    assert made.storage.stored < 0.35 * made.storage.experts


@pytest.mark.parametrize("size", [64, 100])
def test_binders_are_orthogonal_and_do_not_commute(size: int) -> None:
    a, b = (hadamard(generator("a", i), size) for i in range(2))
    one = torch.eye(size, dtype=torch.float64)
    for binder in (a, b):
        matrix = binder.bind(one)
        assert torch.allclose(matrix @ matrix.T, one, atol=1e-10)
        assert torch.allclose(binder.unbind(matrix), one, atol=1e-10)
    x = torch.randn(1, size, dtype=torch.float64, generator=DRAW)
    assert float((a.bind(b.bind(x)) - b.bind(a.bind(x))).norm() / x.norm()) > 0.5
    q = torch.from_numpy(haar(generator("q"), size))
    assert torch.allclose(q @ q.T, one, atol=1e-10)
