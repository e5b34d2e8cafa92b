"""What filters keep is found once in a run, however many looks follow; and again where it could not be noted."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from weightsmith.io import system
from weightsmith.io.write.aside import Aside
from weightsmith.jobs.merge import run
from weightsmith.kernels import job
from weightsmith.recipe.schema import Recipe

SHAPES = {"model.layers.0.mlp.up_proj.weight": (40, 64), "model.norm.weight": (64,)}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    draw = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b", "c"):
        (tmp_path / name).mkdir()
        values = {n: torch.randn(s, generator=draw).bfloat16() for n, s in SHAPES.items()}
        save_file(values, tmp_path / name / "model.safetensors")

    def of(*method: Any) -> Recipe:
        models = {name: str(tmp_path / name) for name in ("a", "b", "c")}
        given = {"base": str(tmp_path / "base"), "models": models, "method": [*method, {"ties": {"density": 0.3}}]}
        return Recipe.model_validate(given)

    return of


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the kernels are called that find out what filters keep."""
    found, kernel = dict[str, int](), job.kernel

    def counting(name: str) -> Callable[..., int]:
        found[name] = found.get(name, 0) + 1
        return kernel(name)

    monkeypatch.setattr(job, "kernel", counting)
    return found


def made(recipe: Recipe, out: Path) -> bytes:
    run(recipe, out, threads=1)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("method", "kernel", "calls"), [("della", "sloped", 6), ("agree", "elected", 2), ("dare", "drawn", 6)]
)
def test_what_a_filter_keeps_is_found_once(
    method: str, kernel: str, calls: int, recipe: Any, called: dict[str, int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Two tensors, three experts; and with no room for notes the same bytes."""
    noted = made(recipe({method: {"density": 0.5}}), tmp_path / "noted")
    assert called == {kernel: calls}
    monkeypatch.setattr(Aside, "put", lambda self, key, data: False)
    assert made(recipe({method: {"density": 0.5}}), tmp_path / "again") == noted
    assert sum(called.values()) > 2 * calls


def test_nothing_is_left_of_the_notes(recipe: Any, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    made(recipe("della"), tmp_path / "out")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out"}
    held = [str(one.readlink()) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    assert not [place for place in held if place.startswith(str(tmp_path / "out.partial"))]


def test_a_note_that_fails_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, aside = np.arange(9, dtype=np.uint8), Aside(tmp_path)
    assert aside.put("a", data)
    found = aside.get("a")
    assert found is not None
    assert np.array_equal(found, data)
    assert aside.get("b") is None
    call = system.call

    def failing(function: Any, *args: Any, **more: Any) -> Any:
        if function in (os.pwrite, os.preadv):
            raise OSError(errno.EIO, "no")
        return call(function, *args, **more)

    monkeypatch.setattr(system, "call", failing)
    assert not aside.put("b", data)
    assert aside.get("a") is None
    monkeypatch.setattr(system, "call", call)
    monkeypatch.setattr(system, "call", lambda function, *args: 3 if function is os.pwrite else call(function, *args))
    assert not aside.put("c", data), "a short write"
    aside.close()
    assert not aside.put("d", data)
    assert not Aside(tmp_path / "missing").put("a", data)


def test_half_of_a_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize = 4, 10

    call = system.call
    monkeypatch.setattr(system, "call", lambda f, *args: Full if f is os.fstatvfs else call(f, *args))
    aside = Aside(tmp_path)
    assert [aside.put(i, np.zeros(9, np.uint8)) for i in range(3)] == [True, True, False]
    aside.close()
