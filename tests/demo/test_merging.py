"""Recipes of the demo, the choice on validation, and the caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from demo.family import Family, Scores, fingerprint
from demo.merging import METHODS, Bench, choose, grid, name_for

from demo import merging
from weightsmith.recipe.load import loads


class Toy(Family):
    """A family whose checkpoints and merges are text files; a merge's score is written in its recipe."""

    name = "toy"
    title = "Toy"
    higher_is_better = True
    tasks = ("a", "b")
    guards = ()
    seeds = (0, 1)
    suffix = ".txt"

    def __init__(self) -> None:
        self.trained = 0
        self.scored: list[str] = []

    def key(self, seed: int) -> str:
        return f"key{seed}"

    def train(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self.trained += 1
        for name in ("base", "a", "b", "joint"):
            (folder / f"{name}.txt").write_text(name, "utf-8")

    def scores(self, model: Path, seed: int, split: str) -> dict[str, float]:
        self.scored.append(split)
        strength = float((model / "lambda").read_text("utf-8"))
        best = 0.4 if split == "validation" else 0.7  # the test split would choose otherwise
        return {"a": -abs(strength - best), "b": 0.0}


@pytest.fixture
def benches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Bench]:
    family = Toy()

    def merge(recipe: Path, out: Path) -> None:
        out.mkdir(parents=True)
        strength = loads(recipe.read_text("utf-8")).method[0].parameters["lambda"]
        (out / "lambda").write_text(str(strength), "utf-8")

    monkeypatch.setattr(merging, "merge", merge)
    scores = Scores(tmp_path / "scores.json")
    return [Bench(family, seed, family.checkpoints(tmp_path, seed, print), scores) for seed in family.seeds]


def test_coefficients_are_chosen_on_validation_and_never_on_test(benches: list[Bench]) -> None:
    best, tried = choose(benches, "task arithmetic")
    assert best.label == "lambda 0.4"
    assert set(tried) == {"lambda 0.3", "lambda 0.4", "lambda 0.5", "lambda 0.7"}
    assert set(benches[0].family.scored) == {"validation"}  # type: ignore[attr-defined]


def test_nothing_is_trained_or_scored_twice(benches: list[Bench], tmp_path: Path) -> None:
    choose(benches, "task arithmetic")
    family = benches[0].family
    before = len(family.scored)  # type: ignore[attr-defined]
    assert before == 8
    again = Scores(tmp_path / "scores.json")
    fresh = [Bench(family, b.seed, family.checkpoints(tmp_path, b.seed, print), again) for b in benches]
    choose(fresh, "task arithmetic")
    assert len(family.scored) == before  # type: ignore[attr-defined]
    assert family.trained == 2  # type: ignore[attr-defined]


def test_a_changed_engine_merges_and_scores_anew(benches: list[Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    choose(benches, "task arithmetic")
    monkeypatch.setattr(merging, "engine", lambda: "another")
    choose(benches, "task arithmetic")
    assert len(benches[0].family.scored) == 16  # type: ignore[attr-defined]
    assert all(len(list((bench.folder / "merged").iterdir())) == 8 for bench in benches)


def test_a_killed_training_leaves_no_checkpoints_behind(tmp_path: Path) -> None:
    class Killed(Toy):
        def train(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
            super().train(folder, seed, say)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Killed().checkpoints(tmp_path, 0, print)
    family = Toy()
    family.checkpoints(tmp_path, 0, print)
    assert family.trained == 1


def test_a_grid_is_every_combination_and_names_what_varies() -> None:
    made = grid(("dare", {"density": (0.5, 0.8)}), ("ties", {"density": (1.0,), "lambda": (1.0, 1.5)}))
    assert [candidate.label for candidate in made] == [
        "density 0.5, lambda 1",
        "density 0.5, lambda 1.5",
        "density 0.8, lambda 1",
        "density 0.8, lambda 1.5",
    ]
    assert made[1].stages == (("dare", {"density": 0.5}), ("ties", {"density": 1.0, "lambda": 1.5}))


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_of_the_demo_is_valid(method: str) -> None:
    for candidate in METHODS[method]:
        recipe = loads(candidate.recipe({"one": "one.safetensors", "two": "two"}, "base", 3))
        assert [(stage.name, stage.parameters) for stage in recipe.method] == [
            (name, dict(parameters)) for name, parameters in candidate.stages
        ]
        assert recipe.seed == 3
        assert list(recipe.models) == ["one", "two"]


def test_names_are_plain() -> None:
    assert name_for("rotate 90") == "rotate-90"
    assert name_for("TIES density 0.5, lambda 1") == "ties-density-0.5-lambda-1"


def test_a_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
