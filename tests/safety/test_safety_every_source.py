"""NaN and Inf are found under every registered method and in every kind of file, with tensor, model and place."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kit import count_for, stage_of
from matrix import BARE, CODECS, NAMES, merged, models
from reliability.runs import save_sharded
from weightsmith.core.errors import NumericError
from weightsmith.io.read.source import MemorySource
from weightsmith.jobs.compress import compress
from weightsmith.jobs.merge import run
from weightsmith.recipe.load import loads

PLACES = {"model.layers.0.mlp.down_proj.weight": (3, 2), "model.norm.weight": (4,)}
"""A matrix and a vector, which many methods merge differently."""


@pytest.mark.parametrize("path", ["as it comes", "torch"])
@pytest.mark.parametrize("name", NAMES + CODECS)
def test_every_method_names_the_tensor_the_model_and_the_place(
    name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the base, in the first and in the last expert."""
    if path == "torch":
        monkeypatch.setenv("WEIGHTSMITH_KERNELS", "0")
    last = f"e{count_for(stage_of(name, **BARE.get(name, {}))) - 1}"
    for tensor, place in PLACES.items():
        for victim, value, said in (("base", math.nan, "NaN"), ("e0", -math.inf, "-Inf"), (last, math.nan, "NaN")):
            tensors = models()
            tensors[victim][tensor][place] = value
            sources = {model: MemorySource(each, model) for model, each in tensors.items()}
            where = re.escape(f"{tensor} in {victim} holds {said} at {list(place)}")
            with pytest.raises(NumericError, match=f"^{where}"):
                merged(name, sources)


Tensors = dict[str, torch.Tensor]
FULL = (32, 64)


def plain() -> Tensors:
    torch.manual_seed(0)
    return {"m.weight": torch.randn(FULL), "n.weight": torch.randn(FULL)}


def bad() -> Tensors:
    tensors = plain()
    tensors["m.weight"][7, 5] = float("nan")
    return tensors


def one_file(folder: Path) -> str:
    save_sharded(bad(), folder, 1)
    return "a: ./a"


def shards(folder: Path) -> str:
    save_sharded(bad(), folder, 2)
    return "a: ./a"


def checkpoint(folder: Path) -> str:
    folder.mkdir()
    torch.save(bad(), folder / "pytorch_model.bin")
    return "a: ./a"


def legacy_checkpoint(folder: Path) -> str:
    folder.mkdir()
    torch.save(bad(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return "a: ./a"


def adapter(folder: Path) -> str:
    folder.mkdir()
    factors = {"lora_A": torch.zeros(2, FULL[1]), "lora_B": torch.ones(FULL[0], 2)}
    factors["lora_A"][1, 5] = float("nan")
    factors["lora_B"][:7, 1] = factors["lora_B"][8:, 1] = 0.0
    stored = {f"base_model.model.m.{part}.weight": tensor for part, tensor in factors.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["m"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return "a: ./a"


def scaled_fp8(folder: Path) -> str:
    """The weights are fine, the scale of a block is not."""
    folder.mkdir()
    stored: Tensors = {}
    for name in plain():
        stored[name] = torch.ones(FULL).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.ones(4, 8)
    stored["m.weight_scale_inv"][0, 0] = float("nan")
    save_file(stored, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    (folder / "config.json").write_text(json.dumps(config))
    return "a: ./a"


def nested(folder: Path) -> str:
    one_file(folder)
    return "a: {models: {x: ./a, y: ./b}, method: linear}"


def compressed(folder: Path) -> str:
    """A stored part of the expert is damaged, and its checksum made to fit nothing."""
    place = folder.parent
    save_sharded({n: t + 0.1 for n, t in plain().items()}, place / "other", 1)
    squeezed = "base: ./base\nmodels: {a: ./other, b: ./b}\nmethod: tall_masks"
    compress(loads(squeezed, folder=place), folder, threads=1, accept_loss=True)
    file = next(folder.glob("*.safetensors"))
    from safetensors import safe_open
    from safetensors.torch import load_file

    stored = load_file(file)
    (name,) = [n for n in stored if n.startswith("m.weight::tau")]
    stored[name][7, 5] = float("nan")
    with safe_open(file, "pt") as opened:
        save_file(stored, file, opened.metadata())
    return "a: {model: ./a, expert: a}"


KINDS: dict[str, tuple[Callable[[Path], str], str]] = {
    "one file": (one_file, r"m.weight in a holds NaN at \[7, 5\] \(1 in"),
    "shards": (shards, r"m.weight in a holds NaN at \[7, 5\] \(1 in"),
    "checkpoint": (checkpoint, r"m.weight in a holds NaN at \[7, 5\] \(1 in"),
    "legacy checkpoint": (legacy_checkpoint, r"m.weight in a holds NaN at \[7, 5\] \(1 in"),
    "adapter": (adapter, r"m.weight in a holds NaN at \[0, 5\] \(32 in"),  # 0 * NaN is NaN in every row
    "scaled fp8": (scaled_fp8, r"m.weight in a holds NaN at \[0, 0\] \(64 in"),
    "nested": (nested, r"m.weight in x holds NaN at \[7, 5\] \(1 in"),
    "compressed": (compressed, r"m.weight in a holds NaN at"),
}


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(kind: str, method: str, tmp_path: Path) -> None:
    make, text = KINDS[kind]
    save_sharded(plain(), tmp_path / "base", 1)
    save_sharded({n: t * 1.1 for n, t in plain().items()}, tmp_path / "b", 1)
    recipe = loads(f"base: ./base\nmodels: {{{make(tmp_path / 'a')}, b: ./b}}\nmethod: {method}", folder=tmp_path)
    with pytest.raises(NumericError, match=text):
        run(recipe, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "io")
    from gguf_files import tensors, write

    clean, spoilt = tensors(), tensors()
    spoilt["model.layers.1.self_attn.q_proj.weight"][9, 4] = float("inf")
    save_sharded(clean, tmp_path / "base", 1)
    write(tmp_path / "a.gguf", spoilt)
    recipe = loads("base: ./base\nmodels: {a: ./a.gguf}\nmethod: task_arithmetic", folder=tmp_path)
    with pytest.raises(NumericError, match=r"model.layers.1.self_attn.q_proj.weight in a holds Inf at \[9, 4\]"):
        run(recipe, tmp_path / "out", threads=1)
