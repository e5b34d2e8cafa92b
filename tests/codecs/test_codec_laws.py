"""Laws of every codec: stored parts do not depend on the cut, any rows stand alone, and folders give experts back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from goldens.encoded import Encoded, encoded
from kit import state
from weightsmith.io.read.open import open_source
from weightsmith.jobs.compress import compress, restore
from weightsmith.recipe.schema import Recipe

SHAPES = {"embed_tokens.weight": (300, 31), "layers.0.conv.weight": (5, 3, 3), "norm.weight": (13,), "scalar": ()}
TABLE = "embed_tokens.weight"
BASE = state(SHAPES, 0)
EXPERTS = {f"e{i}": {n: BASE[n] + d for n, d in state(SHAPES, i + 1, 0.02 * (i + 1)).items()} for i in range(3)}

METHODS: dict[str, tuple[list[Any], float]] = {
    "bitdelta": (["bitdelta"], 0.13),
    "randes": (["randes"], 1.05),
    "emr_masks": (["emr", "emr_masks"], 1.15),  # tau, and 3 bits per weight
    "tall_masks": (["tall_masks"], 1.15),
    "mbat": ([{"mbat": {"binder": "hadamard", "denoise": "sparse"}}], 1.2),
    "exact": (["exact"], 3.01),
    "tsvc": ([{"tsvc": {"rank_fraction": 0.3}}], 1.2),
    "twin": (["ties", {"twin": {"density": 0.3}}], 2.2),
}
"""Method, and the most that it stores of three experts, as a share of one of them."""

each = pytest.mark.parametrize("name", METHODS)


def stored(name: str, **how: Any) -> Encoded:
    return encoded(METHODS[name][0], BASE, EXPERTS, **how)


@each
def test_the_same_parts_however_cut(name: str) -> None:
    whole, cut = (stored(name, block=size) for size in (1 << 30, 64))
    assert whole.tensors.keys() == cut.tensors.keys()
    assert [n for n, t in whole.tensors.items() if not torch.equal(t, cut.tensors[n])] == []


@pytest.mark.parametrize("name", ["bitdelta", "randes", "emr_masks", "tall_masks", "exact"])
def test_any_rows_stand_alone(name: str) -> None:
    made, width = stored(name), SHAPES[TABLE][1]
    full = made.rebuilt(TABLE, "e1", BASE[TABLE])
    task = next(t for t in made.plan.tasks if t.key.name == TABLE)
    for low, high in [(0, 3), (216, 219), (217, 218), (299, 300)]:
        parts = {}
        for part in (p for p in task.encoded if p.expert in ("", "e1")):
            first, last = part.rows(low * width, high * width)
            parts[part.name] = made.tensors[part.key.name][first:last]
        codec = task.pipeline.codec
        assert codec is not None
        assert torch.equal(codec.decode(parts, BASE[TABLE][low:high], low * width), full[low:high])


@each
def test_a_folder_gives_its_experts_back(name: str, tmp_path: Path) -> None:
    for model, tensors in {"base": BASE, **EXPERTS}.items():
        (tmp_path / model).mkdir()
        save_file(tensors, tmp_path / model / "model.safetensors")
    method, most = METHODS[name]
    models = {n: {"model": str(tmp_path / n)} for n in EXPERTS}
    recipe = Recipe.model_validate({"base": str(tmp_path / "base"), "models": models, "method": tuple(method)})
    storage = compress(recipe, tmp_path / "packed", accept_loss=True).storage
    assert storage is not None
    assert storage.stored < sum(t.numel() for t in BASE.values()) * 4 * most
    (tmp_path / "e2" / "model.safetensors").unlink()
    again = load_file(restore(tmp_path / "packed", "e2", tmp_path / "again").out / "model.safetensors")
    made = stored(name)
    assert [n for n in BASE if not torch.equal(again[n], made.rebuilt(n, "e2", BASE[n]))] == []
    view = open_source(str(tmp_path / "packed"), expert="e2")
    pieces = [view.read(TABLE, low, min(low + 7, 300)) for low in range(0, 300, 7)]
    assert torch.allclose(torch.cat(pieces), again[TABLE], atol=1e-6)
