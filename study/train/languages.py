"""Texts of three kinds, and language models so small that they learn one in a minute."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["KINDS", "Texts", "batches", "llama", "loss_of", "read", "rows_of", "train"]

KINDS = ("maths", "code", "prose")
WIDTH, LENGTH, BATCH = 96, 96, 16

Texts = Mapping[str, Mapping[str, Sequence[str]]]
"""Kind -> part (train, test) -> texts."""


def read(data: Path) -> Texts:
    """GSM8K's problems with their answers, HumanEval's programs, speeches of Shakespeare."""
    lines = {part: (data / f"gsm8k_{part}.jsonl").read_text("utf-8").splitlines() for part in ("train", "test")}
    maths = {part: [_joined(json.loads(line), "question", "answer") for line in own] for part, own in lines.items()}
    programs = gzip.decompress((data / "humaneval.jsonl.gz").read_bytes()).decode().splitlines()
    code = [_joined(json.loads(line), "prompt", "canonical_solution") for line in programs]
    prose = [text for text in (data / "tinyshakespeare.txt").read_text("utf-8").split("\n\n") if len(text) > 80]
    return {
        "maths": {"train": maths["train"], "test": maths["test"][:200]},
        "code": {"train": code[40:], "test": code[:40]},
        "prose": {"train": prose[400:], "test": prose[:200]},
    }


def _joined(row: Mapping[str, str], *fields: str) -> str:
    return "\n".join(row[field].strip("\n") for field in fields)


def llama(seed: int, vocabulary: int = 256) -> nn.Module:
    """A Llama of some 300,000 weights; of 256 tokens, which are bytes, unless said otherwise."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, **sizes
        )
    )


def batches(texts: Sequence[str], seed: int, batch: int = BATCH, length: int = LENGTH) -> Iterator[Tensor]:
    """Endless random windows of bytes: [batch, length + 1]."""
    whole = torch.tensor([*"\n\n".join(texts).encode()])
    draw = np.random.default_rng(seed)
    while True:
        yield torch.stack([whole[i : i + length + 1] for i in draw.integers(0, len(whole) - length - 1, batch)])


def rows_of(texts: Sequence[str], count: int = 64, length: int = LENGTH) -> Tensor:
    """The same windows of bytes for everybody: [count, length + 1]."""
    return next(batches(texts, 1234, count, length))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Of the next byte, in nats."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, given: Iterator[Tensor], steps: int,
    loss: Callable[[nn.Module, Tensor], Tensor] = loss_of,
) -> None:  # fmt: skip
    """In place, with a short warm-up, then a cosine down to a tenth of the rate."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        factor = min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad()
        loss(model, next(given)).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
