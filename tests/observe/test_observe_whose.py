"""Whose statistics they are: those of another model are not taken for a model's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from observe_models import saved, tiny_llama
from safetensors.torch import load_file, save_file

from weightsmith.core.errors import PlanError
from weightsmith.jobs.merge import run
from weightsmith.observe.collect import observe
from weightsmith.recipe.load import loads

torch.set_num_threads(1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two models with the Fisher of each beside it."""
    for seed, name in enumerate("ab"):
        saved(tiny_llama(seed), tmp_path / name)
        observe(tmp_path / name, ["some text"], ["fisher"], tmp_path / f"{name}-stats")
    return tmp_path


def warnings(place: Path, a: str = "a-stats", b: str = "b-stats", floor: float = 1e-30) -> list[str]:
    models = f"models: {{a: {{model: a, stats: {a}}}, b: {{model: b, stats: {b}}}}}"
    recipe = loads(f"{models}\nmethod: {{fisher: {{floor: {floor}}}}}\n", "r.yaml", folder=place)
    return [str(text) for text in run(recipe, place / "out", threads=1, overwrite=True).warnings]


def test_those_of_another_model_of_the_recipe_are_refused(place: Path) -> None:
    assert warnings(place) == []
    with pytest.raises(PlanError) as refused:
        warnings(place, "b-stats", "a-stats")
    file = "{}-stats/fisher.safetensors"
    assert [str(problem) for problem in refused.value.problems] == [
        f"a: the statistic 'fisher' in {place / file.format('b')} was taken of b, not of a; give a its own",
        f"b: the statistic 'fisher' in {place / file.format('a')} was taken of a, not of b; give b its own",
    ]


def test_those_of_other_files_are_mentioned(place: Path) -> None:
    """They may hold the same weights in another dtype: only the user knows."""
    weights = load_file(place / "a" / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in weights.items()}, place / "a" / "model.safetensors", {"format": "pt"})
    assert warnings(place) == [
        f"a: the statistic 'fisher' in {place / 'a-stats/fisher.safetensors'} was taken of other files than a's: right "
        "only if they hold the same weights in another form"
    ]


def test_a_copy_of_the_model_is_the_model(place: Path) -> None:
    for folder in ("a", "b"):
        file = place / folder / "model.safetensors"
        text = file.read_bytes()
        file.unlink()
        file.write_bytes(text)
    assert warnings(place) == []


def test_a_statistic_that_names_no_files_is_taken(place: Path) -> None:
    file = place / "b-stats" / "fisher.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    told = json.loads(header["__metadata__"]["weightsmith"])
    assert sorted(next(iter(told["fingerprint"]["files"].values()))) == ["header", "sample", "size"]
    del told["fingerprint"]
    header["__metadata__"]["weightsmith"] = json.dumps(told)
    text = json.dumps(header).encode()
    other = place / "c-stats" / "fisher.safetensors"
    other.parent.mkdir()
    other.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    assert warnings(place, "c-stats", "b-stats") == []


def test_a_floor_above_all_fishers_is_mentioned(place: Path) -> None:
    found = [load_file(place / f"{name}-stats" / "fisher.safetensors") for name in "ab"]
    largest = max(float(t.max()) for one in found for t in one.values())
    mean = max(float(t.double().mean()) for one in found for t in one.values())
    (said,) = warnings(place, floor=1e4 * largest)
    assert said == (
        f"fisher: floor = {1e4 * largest:g} is above the Fisher information of every tensor (mean {mean:.2g} at most, "
        f"largest {largest:.2g}): the result is the plain mean; set floor to {1e-6 * mean:.1g}, a millionth of that"
    )
    a, b, out = (load_file(place / name / "model.safetensors") for name in ("a", "b", "out"))
    assert all(torch.allclose(out[n], (a[n] + b[n]) / 2, atol=1e-4) for n in a)
    (said,) = warnings(place, floor=(mean + largest) / 2)
    assert ": the result is nearly the plain mean; set floor" in said
    assert warnings(place, floor=mean / 2) == []
