"""Golden cases of LoRA tools: adapters drawn as the case says, written as PEFT folders, combined and read again."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from goldens import tiny_llama
from weightsmith import lora
from weightsmith.io.read.source import MemorySource

SHAPES = {"q_proj": (32, 32), "up_proj": (48, 32)}
CHANGED = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight",
           "model.layers.2.mlp.down_proj.weight")  # fmt: skip
ELEMENTARY = ("ties", "magnitude_prune", "dare_ties", "dare_linear")
PREFIX = "base_model.model."


def outcome(seed: int, params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor of a case: of each kind, delta, rank and (where unique) factors; rank-r extractions.

    A case's number of experts is that of its adapters; the fine-tuned model is the only one of its draw.
    """
    base, (tuned,) = tiny_llama.make(seed, 1)
    models = [MemorySource({n: torch.from_numpy(x) for n, x in m.items()}, "model") for m in (tuned, base)]
    found: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters = drawn(folder, seed, params["ranks"], params["alphas"])
        for kind in params["kinds"]:
            found |= combined(adapters, kind, params, folder / f"out-{kind}")
        for rank in params["extract_ranks"]:
            out = folder / f"extracted-{rank}"
            lora.extract(*models, out, rank=rank, include=CHANGED)
            factors, _ = read(out)
            for weight in CHANGED:
                b, a = factors[weight.removesuffix(".weight")]
                found[f"extract.rank{rank}.{weight}"] = b @ a
    return found


def drawn(folder: Path, seed: int, ranks: list[int], alphas: list[float]) -> dict[str, Path]:
    rng = np.random.Generator(np.random.PCG64([seed, 6]))
    made = {}
    for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        tensors = {}
        for module, (outputs, inputs) in SHAPES.items():
            a = (rng.standard_normal((r, inputs)) / np.sqrt(inputs)).astype(np.float32)
            b = (rng.standard_normal((outputs, r)) * 0.1).astype(np.float32)
            tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        made[f"adapter{i}"] = written(folder / f"adapter{i}", tensors, r=r, lora_alpha=alpha)
    return made


def written(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "target_modules": list(SHAPES), **config})
    )
    return folder


def combined(adapters: Mapping[str, Path], kind: str, params: Mapping[str, Any], out: Path) -> dict[str, Tensor]:
    method = kind.removesuffix("_frequency")
    given: dict[str, Any] = {"weight": params["weights"]}
    if method.removesuffix("_svd") in ELEMENTARY:
        given["density"] = params["density"]
    if method.endswith("svd"):
        given["rank"] = params["svd_rank"]
    if kind.endswith("_frequency"):
        given["vote"] = "frequency"
    lora.merge(adapters, method, out, **given)
    factors, config = read(out)
    found = {}
    for module, (b, a) in factors.items():
        found |= {f"{kind}.{module}.delta": b @ a, f"{kind}.{module}.rank": torch.tensor(a.shape[0])}
        if not method.endswith("svd"):
            found |= {f"{kind}.{module}.lora_A": a, f"{kind}.{module}.lora_B": b}
    assert config["lora_alpha"] == config["r"]
    return found


def read(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """Module -> (B, A) of a PEFT folder whose scale is 1."""
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = [n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in tensors if n.endswith("lora_A.weight")]
    pairs = {m: (tensors[f"{PREFIX}{m}.lora_B.weight"], tensors[f"{PREFIX}{m}.lora_A.weight"]) for m in modules}
    return pairs, json.loads((folder / "adapter_config.json").read_text())
