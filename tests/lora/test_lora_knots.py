"""KnOTS on adapters: that of the full models, from the factors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import adapter, deltas, llama, loaded
from torch import Tensor

import weightsmith
from weightsmith import lora
from weightsmith.core.site import Site
from weightsmith.io.read.lora_files import read_adapter
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource
from weightsmith.ops.lowrank import Factors

CASES: list[dict[str, Any]] = [
    {},
    {"density": 0.3, "scaling": 0.8},
    {"density": 0.5, "rule": "mean", "shared": "right"},
    {"sign": "count", "aggregate": "sum", "scaling": (1.0, 0.5, 0.25)},
    {"drop": 0.4},
]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Unlike ranks and scales; the third adapts other modules too."""
    folder = tmp_path_factory.mktemp("knots")
    configs = [
        {"r": 2, "lora_alpha": 6},
        {"r": 3, "use_rslora": True},
        {"r": 2, "target_modules": ["q_proj", "up_proj"]},
    ]
    return {
        f"a{i}": adapter(folder / f"a{i}", llama, i, **{"target_modules": ["q_proj"], **config})
        for i, config in enumerate(configs)
    }


def refuse(*_: object) -> Tensor:
    raise AssertionError("a full matrix was formed")


@pytest.mark.parametrize("given", CASES)
def test_the_result_is_that_of_the_full_models(
    monkeypatch: pytest.MonkeyPatch, paths: dict[str, Path], tmp_path: Path, given: dict[str, Any]
) -> None:
    base = MemorySource(llama().state_dict(), "base")
    experts = {name: open_source(path, base=base) for name, path in paths.items()}
    full = {name: {k: source.read(k) for k in source.keys} for name, source in experts.items()}
    adapted = sorted({f"{m}.weight" for path in paths.values() for m in read_adapter(path).modules})
    small = {name: {k: state[k] for k in adapted} for name, state in full.items()}
    want = weightsmith.merge(small, weightsmith.Knots(**given), {k: base.read(k) for k in adapted})
    with monkeypatch.context() as patch:
        patch.setattr(Factors, "product", property(refuse))
        patch.setattr(Site, "deltas", property(refuse))
        result = lora.merge(paths, "knots", tmp_path / "out", **given)
    got = deltas(loaded(llama, {"x": tmp_path / "out"}), "x")
    loose = {"atol": 1e-5} if "drop" not in given else {"atol": 1e-4}
    assert len(got) == len(adapted)
    for name, tensor in got.items():
        key = name.removeprefix("base_model.model.") + ".weight"
        assert torch.allclose(tensor, want[key] - base.read(key), **loose), name
    assert all(m.rank <= 7 for m in result.modules)
    assert result.worst < 1e-6


def test_a_rank_cuts_the_result(paths: dict[str, Path], tmp_path: Path) -> None:
    lora.merge(paths, "knots", tmp_path / "all")
    cut = lora.merge(paths, "knots", tmp_path / "cut", rank=2)
    found = read_adapter(tmp_path / "all")
    for module in cut.modules:
        s = torch.linalg.svdvals(found.factors(module.name)[0].product.double())
        assert module.rank == 2
        assert module.error == pytest.approx(float(s[2:].norm() / s.norm()), abs=1e-5)
        assert module.energy == pytest.approx(1 - module.error**2, abs=1e-6)
