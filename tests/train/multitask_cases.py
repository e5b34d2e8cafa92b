"""Small models and data of several tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def save(kind: str, path: Path) -> Path:
    """A model with random weights; tokens are bytes, images 16 x 16."""
    torch.manual_seed(0)
    made: Any
    if kind == "llama":
        ends = {"bos_token_id": None, "eos_token_id": None}
        made = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=256, max_position_embeddings=256, **ends, **SIZES)
        )
    elif kind == "t5":
        ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        made = transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **ids)
        )
    elif kind == "bert":
        made = transformers.BertModel(transformers.BertConfig(vocab_size=256, max_position_embeddings=64, **SIZES))
    elif kind == "vit":
        made = transformers.ViTModel(
            transformers.ViTConfig(image_size=16, patch_size=4, **SIZES), add_pooling_layer=False
        )
    else:
        text = {"vocab_size": 256, "max_position_embeddings": 24, "eos_token_id": 255, "bos_token_id": 254, **SIZES}
        vision = {"image_size": 16, "patch_size": 4, **SIZES}
        made = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        )
    made.save_pretrained(path)
    return path


def texts(path: Path, count: int, answer: Callable[[str], str], seed: int = 0) -> Path:
    """Words of four letters a to h, each with its answer."""
    draw = np.random.default_rng(seed)
    words = ["".join(draw.choice(list("abcdefgh"), 4)) for _ in range(count)]
    path.write_text("".join(json.dumps({"input": w, "output": answer(w)}) + "\n" for w in words))
    return path


def images(
    path: Path,
    count: int,
    target: Callable[[np.ndarray], np.ndarray],
    seed: int = 0,
    side: int = 16,
    key: str = "target",
) -> Path:
    """Random images of bytes, and what a function of one makes of it."""
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    np.savez(path, x=x, **{key: np.stack([target(one) for one in x])})
    return path


def first(word: str) -> str:
    return "low" if word[0] < "e" else "high"


def last(word: str) -> str:
    return "soft" if word[-1] < "e" else "hard"


def bright(image: np.ndarray) -> Any:
    return int(image[:8].mean() > image[8:].mean())
