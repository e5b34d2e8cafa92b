"""A byte-level Llama on four unlike kinds of text, stored and loaded in Hugging Face format.

Bytes are the vocabulary, so no tokenizer is needed.  Every window begins with a tag that names its kind of text;
the tag is given, so it does not count in the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from demo.corpus import SPLITS, Corpus, corpus
from demo.digits import warm_up_then_cosine
from demo.family import Family, fingerprint

TAGS: Mapping[str, bytes] = {"Python": b"<py>", "English": b"<en>", "JSON": b"<js>", "French": b"<fr>"}
TASKS = tuple(TAGS)


@dataclass(frozen=True)
class Training:
    """Settings; equal settings and equal text give equal checkpoints."""

    hidden: int = 256
    layers: int = 2
    heads: int = 4
    mlp: int = 768
    context: int = 128
    batch: int = 12
    base_steps: int = 300
    base_rate: float = 3e-3
    expert_steps: int = 60
    expert_rate: float = 1e-4
    joint_steps: int = 80
    validation_windows: int = 32  # per kind of text
    test_windows: int = 96


# --- data ------------------------------------------------------------------------------------------


def windows(texts: tuple[bytes, ...], tag: bytes, count: int, length: int, draw: np.random.Generator) -> Tensor:
    """Random pieces of some texts behind a tag: [count, length] int64.  Longer texts are drawn more often."""
    body = length - len(tag)
    room = np.array([max(0, len(text) - body + 1) for text in texts], dtype=np.float64)
    rows = np.empty((count, length), dtype=np.int64)
    for row, index in zip(rows, draw.choice(len(texts), count, p=room / room.sum()), strict=True):
        start = int(draw.integers(int(room[index])))
        row[:] = np.frombuffer(tag + texts[index][start : start + body], dtype=np.uint8)
    return torch.from_numpy(rows)


def batches(data: Corpus, domains: tuple[str, ...], size: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of training windows, an equal number from each domain."""
    draw = np.random.default_rng(seed)
    share = size // len(domains)
    while True:
        yield torch.cat([windows(data[name]["train"], TAGS[name], share, length, draw) for name in domains])


# --- network and training --------------------------------------------------------------------------


def network(settings: Training) -> Any:
    """A fresh LlamaForCausalLM with bytes for tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=settings.hidden,
            intermediate_size=settings.mlp,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=settings.context,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def bits(model: nn.Module, rows: Tensor, tag: int = 4) -> Tensor:
    """Mean bits per byte of windows, tag not counted.  rows: [n, length]."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits[:, tag - 1 :]
    nats: Tensor = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, tag:].flatten())
    return nats / math.log(2)


def fit(model: nn.Module, stream: Iterator[Tensor], steps: int, rate: float) -> None:
    """Train in place with AdamW; gradients clipped at norm 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * warm_up_then_cosine(step, steps)
        optimizer.zero_grad()
        bits(model, next(stream)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def train(folder: Path, seed: int, settings: Training, data: Corpus, say: Callable[[str], None]) -> None:
    """Write base, experts and the jointly trained model as Hugging Face folders."""
    torch.manual_seed(seed)
    model = network(settings)

    def run(name: str, domains: tuple[str, ...], steps: int, rate: float, tag: int) -> None:
        say(f"{name}, {steps} steps")
        fit(model, batches(data, domains, settings.batch, settings.context, 1000 * seed + tag), steps, rate)
        model.save_pretrained(folder / name)

    run("base", TASKS, settings.base_steps, settings.base_rate, tag=0)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    for tag, task in enumerate(TASKS, start=1):
        model.load_state_dict(base)
        run(task, (task,), settings.expert_steps, settings.expert_rate, tag)
    model.load_state_dict(base)
    run("joint", TASKS, settings.joint_steps, settings.expert_rate, tag=len(TASKS) + 1)


# --- evaluation ------------------------------------------------------------------------------------


class Text(Family):
    """Four kinds of text, one seed, bits per byte."""

    name = "text"
    title = "A small Llama on unlike kinds of text"
    about = (
        "A byte-level Llama of 1.8 M weights in Hugging Face format, on text that the dependencies ship: "
        "scikit-learn's Python, English prose from SciPy's and NumPy's docstrings, JSON answers of OpenML, "
        "Sphinx's messages in French."
    )
    score_name = "bits per byte"
    higher_is_better = False
    tasks = TASKS
    guards = ()
    forgetting_means = "bits per byte gained over the base, averaged over the four kinds, counting only rises"
    seeds = (0,)
    suffix = ""

    def __init__(self, home: Path, settings: Training | None = None) -> None:
        self.settings = settings or Training()
        self.data = corpus(home / self.name)

    def key(self, seed: int) -> str:
        import transformers

        texts = [fingerprint(text.hex()) for name in TASKS for split in SPLITS for text in self.data[name][split]]
        versions = (torch.__version__, transformers.__version__)
        return fingerprint(asdict(self.settings), seed, versions, texts, Path(__file__).read_text("utf-8"))

    def train(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        train(folder, seed, self.settings, self.data, say)

    @torch.no_grad()
    def scores(self, model: Path, seed: int, split: str) -> dict[str, float]:
        from transformers import LlamaForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        loaded = LlamaForCausalLM.from_pretrained(model, local_files_only=True).eval()
        settings, found = self.settings, {}
        count = settings.test_windows if split == "test" else settings.validation_windows
        for number, name in enumerate(TASKS):
            draw = np.random.default_rng([number, SPLITS.index(split)])  # every model sees the same windows
            rows = windows(self.data[name][split], TAGS[name], count, settings.context, draw)
            found[name] = float(np.mean([bits(loaded, part).item() for part in torch.split(rows, 32)]))
        return found
