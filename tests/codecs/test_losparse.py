"""losparse: a low-rank product, and the rows that it misses most."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from goldens.encoded import Encoded, encoded
from weightsmith.cli.main import main
from weightsmith.codecs.losparse import Losparse
from weightsmith.core.keys import Key

UP = "layers.0.up_proj.weight"
STACK = "layers.0.experts.up_proj"


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(value: torch.Tensor, name: str = UP, **parameters: float) -> Encoded:
    return encoded({"losparse": parameters}, {name: torch.zeros_like(value)}, {"m": {name: value}})


def rebuilt(value: torch.Tensor, **parameters: float) -> torch.Tensor:
    return stored(value, **parameters).rebuilt(UP, "m", torch.empty_like(value))


def cut(value: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(value.double(), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def test_without_rows_it_is_the_plain_svd():
    value = weight(24, 16)
    # r = ceil(0.15 * 24 * 16 / 40) = 2
    assert torch.allclose(rebuilt(value, ratio=0.15, rows=0).double(), cut(value, 2), atol=1e-5)


def test_the_rows_that_are_missed_most_come_back_exactly():
    value = weight(24, 16)
    missed = torch.linalg.vector_norm(value - cut(value, 2), dim=1)
    kept = missed.sort(descending=True).indices[:5]  # round(0.2 * 24)
    found = rebuilt(value, ratio=0.15, rows=0.2)
    assert torch.allclose(found[kept], value[kept], atol=1e-6)
    others = [i for i in range(24) if i not in kept.tolist()]
    assert torch.allclose(found[others].double(), cut(value, 2)[others], atol=1e-5)


def test_stacked_experts_are_factored_one_by_one_and_their_rows_compete():
    value = weight(3, 12, 10)
    value[1] *= 10  # misses most, so that all rows that are kept are its
    found = rebuilt(value, ratio=0.2, rows=0.25)  # r = ceil(0.2 * 120 / 22) = 2; round(0.25 * 36) = 9 rows
    assert torch.allclose(found[[0, 2]].double(), cut(value, 2)[[0, 2]], atol=1e-5)
    exact = (found[1] - value[1]).abs().amax(1) < 1e-5
    assert int(exact.sum()) == 9


def test_how_many_numbers_are_stored():
    made = stored(weight(40, 30), ratio=0.15, rows=0.1)
    # r = ceil(0.15 * 1200 / 70) = 3; 4 rows of 30, and where they are
    assert {n.split("::")[1]: list(t.shape) for n, t in made.tensors.items()} == {
        "left.m": [40, 3], "right.m": [30, 3], "rest.m": [4, 30], "place.m": [4],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight", "layers.0.norm.weight"])
def test_what_stays_whole(name):
    shape = (8,) if "norm" in name else (16, 8)
    made = stored(weight(*shape), name)
    assert list(made.tensors) == [f"{name}::whole.m"]


def test_a_weight_that_would_take_more_room_stays_whole():
    assert Losparse(ratio=1.0)._sizes(Key("a", (16, 12), "float32")) == (0, 0)
    assert Losparse(rows=1.0)._sizes(Key("a", (16, 12), "float32")) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_on_disk(tmp_path: Path, dtype: torch.dtype):
    (tmp_path / "model").mkdir()
    tensors = {UP: weight(40, 30).to(dtype), STACK: weight(4, 20, 24, seed=1).to(dtype), "norm.weight": weight(7)}
    save_file(tensors, tmp_path / "model/model.safetensors")
    (tmp_path / "recipe.yaml").write_text(f"models: {{m: {tmp_path}/model}}\nmethod: {{losparse: {{rows: 0.2}}}}\n")
    assert main(["compress", str(tmp_path / "recipe.yaml"), str(tmp_path / "small"), "--quiet"]) == 0
    assert main(["restore", str(tmp_path / "small"), str(tmp_path / "full"), "--expert", "m", "--quiet"]) == 0
    found = load_file(tmp_path / "full/model.safetensors")
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in tensors.items()}
    assert torch.equal(found["norm.weight"], tensors["norm.weight"])
    for name, rows in ((UP, 8), (STACK, 16)):
        error = (found[name] - tensors[name]).float().reshape(-1, tensors[name].shape[-1]).abs().amax(1)
        assert int((error < (1e-5 if dtype is torch.float32 else 0.02)).sum()) >= rows
        assert float((found[name] - tensors[name]).norm() / tensors[name].norm()) < 1
