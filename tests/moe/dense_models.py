"""Tiny random dense models, saved as transformers saves them, and recipes over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def dense(family: str, seed: int, **more: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(0, 0.1)  # transformers starts them at zero
    return model


def saved(folder: Path, family: str, seed: int, **more: Any) -> Path:
    dense(family, seed, **more).save_pretrained(folder)
    return folder


def moved(base: Path, folder: Path, seed: int, size: float = 0.05, part: str = "") -> Path:
    """A fine-tune: the base with every tensor a little off, or only those with `part` in their names."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    torch.manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    tuned = {n: t + size * torch.randn_like(t) if part in n else t for n, t in tensors.items()}
    save_file(tuned, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder
