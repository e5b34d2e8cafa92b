"""How an inspection runs: threads, blocks, what is left out, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from inspected import of
from torch import Tensor

from weightsmith.core.errors import NumericError, PlanError
from weightsmith.core.task import BLOCK
from weightsmith.inputs.opened import Inputs
from weightsmith.inspect.run import inspect
from weightsmith.inspect.spectra import Spectrum
from weightsmith.io.read.source import Bits, MemorySource
from weightsmith.recipe.schema import Recipe

torch.set_num_threads(1)


def random(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_threads_do_not_matter_and_progress_ends() -> None:
    shapes = {"a": (700, 600), "b": (30, 20), "c": (5,)}  # a: two blocks
    base, *deltas = (random(i, **shapes) for i in range(3))
    seen: list[tuple[int, int]] = []
    one = of(base, deltas, spectra=64)
    two = of(base, deltas, spectra=64, threads=2, progress=lambda done, total: seen.append((done, total)))
    assert one == two
    assert seen[-1] == (420_605, 420_605)
    assert list(one.tensors) == ["a", "b", "c"]
    assert one.tensors["a"].spectra is None
    assert one.tensors["b"].spectra is not None


class Recording(MemorySource):
    """Notes how many entries every read asks for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.sizes: list[int] = []

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        found = super().block(name, low, high)
        self.sizes.append(found.array.size)
        return found


def test_blocks_are_all_that_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base, a, b = (Recording(random(i, w=(900, 800))) for i in range(3))
    recipe = Recipe(models={"a": "x", "b": "y"}, method="linear")
    inputs = Inputs(base, {"a": a, "b": b})
    inspect(recipe, sources=inputs, spectra=0, threads=1)
    assert max(max(s.sizes) for s in (base, a, b)) <= BLOCK
    at_once: list[int] = []
    plain = Spectrum.see
    monkeypatch.setattr(Spectrum, "see", lambda self, site: at_once.append(site.count) or plain(self, site))
    small = Inputs(*(lambda s: (s[0], {"a": s[1], "b": s[2]}))([MemorySource(random(i, w=(9, 8))) for i in range(3)]))
    inspect(recipe, sources=small, threads=1)
    assert at_once == [1, 1]


def test_what_is_left_out_is_said() -> None:
    base = {
        "w": torch.zeros(4),
        "ids": torch.arange(3),
        "none": torch.zeros(0, 3),
        "lm_head.weight": torch.zeros(5, 2),
        "gone": torch.zeros(2),
    }
    full = {**base, "w": torch.ones(4)}
    other = {k: v for k, v in full.items() if k != "gone"} | {
        "lm_head.weight": torch.zeros(6, 2),
        "extra": torch.ones(1),
    }
    recipe = Recipe(models={"a": "x", "b": "y"}, method="linear")
    found = inspect(recipe, sources=Inputs(MemorySource(base), {"a": MemorySource(full), "b": MemorySource(other)}))
    assert list(found.tensors) == ["w"]
    assert found.left_out == {
        "ids": "int64, not a weight",
        "none": "empty",
        "lm_head.weight": "float32 [6, 2] in b, float32 [5, 2] in the base",
        "gone": "missing in b",
        "extra": "only in b",
    }


def test_errors() -> None:
    weights = MemorySource({"w": torch.ones(4)})
    recipe = Recipe(models={"a": "x"}, method="linear")

    def run(inputs: Inputs, **options: Any) -> None:
        inspect(recipe, sources=inputs, **options)

    with pytest.raises(PlanError, match=r"need a base model: add 'base:'"):
        run(Inputs(None, {"a": weights}))
    with pytest.raises(PlanError, match="a: no such folder"):
        run(Inputs(weights, {}, problems=("a: no such folder",)))
    with pytest.raises(PlanError, match=r"no floating tensor in common.*w: missing in a"):
        run(Inputs(weights, {"a": MemorySource({"v": torch.ones(4)})}))
    with pytest.raises(NumericError, match=r"w in a holds NaN at \[2\]"):
        run(Inputs(weights, {"a": MemorySource({"w": torch.tensor([1.0, 2.0, float("nan"), 4.0])})}))


def test_allowed_nan_gives_figures_without_a_meaning() -> None:
    broken = torch.ones(4, 4)
    broken[0, 0] = float("nan")
    recipe = Recipe(models={"a": "x"}, method="linear", nonfinite="allow")
    found = inspect(recipe, sources=Inputs(MemorySource({"w": torch.ones(4, 4)}), {"a": MemorySource({"w": broken})}))
    assert found.model.norm == (None,)
    assert found.model.spectra is None
    assert found.model.zeros == (15 / 16,)


def test_one_expert_has_nobody_to_disagree_with() -> None:
    found = of(random(0, w=(8, 8)), [{"w": 0.01 * torch.eye(8)}])
    assert found.model.spectra is not None
    assert found.model.spectra.by_chance is None
    assert not any("cos|" in a.rule or "outvoted" in a.rule or "overlap" in a.rule for a in found.advice)


def test_what_the_recipe_excludes_is_not_looked_at() -> None:
    sources = [MemorySource(random(i, **{"a.weight": (4, 4), "head.weight": (4, 4)})) for i in range(3)]
    tree = {"base": "base", "models": {"a": "a", "b": "b"}, "method": "ties", "exclude": ["head*"]}
    inputs = Inputs(sources[0], {"a": sources[1], "b": sources[2]})
    found = inspect(Recipe.model_validate(tree), sources=inputs)
    assert list(found.tensors) == ["a.weight"]
    assert found.left_out == {"head.weight": "excluded by the recipe"}
