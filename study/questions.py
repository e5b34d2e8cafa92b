"""A small byte-level Llama with questions: which of four texts goes on?

Of Python, English, JSON, French and, where GSM8K's files are given, worked problems.

Every expert stops when it has moved `displacement` of the base's norm.  A question is a piece of text (of GSM8K the
problem) and four continuations of equal length, three of which belong elsewhere; the likeliest counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from demo.corpus import Corpus, corpus
from demo.digits import warm_up_then_cosine
from demo.family import fingerprint
from demo.text import TAGS as KINDS
from demo.text import windows
from safetensors.torch import load_file
from torch import Tensor, nn

TAGS: Mapping[str, bytes] = {**KINDS, "arithmetic": b"<gs>"}


@dataclass(frozen=True)
class Training:
    """Settings; equal settings and equal text give equal checkpoints."""

    hidden: int = 192
    layers: int = 3
    heads: int = 4
    mlp: int = 512
    context: int = 192
    batch: int = 15
    base_steps: int = 500
    base_rate: float = 3e-3
    expert_steps: int = 400  # at most
    expert_rate: float = 2e-4
    displacement: float = 0.025
    joint_steps: int = 200
    validation: int = 40  # questions per task
    test: int = 120
    prompt: int = 64  # bytes
    answer: int = 24


def texts(home: Path, data: Path | None) -> Corpus:
    """The demo's four kinds of text, and GSM8K's problems where the folder `data` has them."""
    found = dict(corpus(home))
    if data is not None and (data / "gsm8k_train.jsonl").is_file():
        lines = {split: _problems(data / f"gsm8k_{split}.jsonl") for split in ("train", "test")}
        held = len(lines["train"]) // 10
        found["arithmetic"] = {
            "train": lines["train"][held:], "validation": lines["train"][:held], "test": lines["test"],
        }  # fmt: skip
    return found


def _problems(file: Path) -> tuple[bytes, ...]:
    """'question\\nanswer\\n' of every problem."""
    items = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return tuple(f"{one['question']}\n{one['answer']}\n".encode() for one in items)


# --- questions ---------------------------------------------------------------------------------------


def questions(
    task: str, documents: Sequence[bytes], count: int, settings: Training, seed: int
) -> Iterator[dict[str, object]]:
    """Seeded questions of one kind; texts whose cut would split a letter are read with replacement, as bytes are."""
    draw = np.random.default_rng([seed, list(TAGS).index(task)])
    long = settings.prompt + settings.answer
    usable = [text for text in documents if len(text) > long + 8]

    def piece() -> tuple[bytes, bytes]:
        text = usable[int(draw.integers(len(usable)))]
        if task == "arithmetic":  # the problem's end and the beginning of its solution
            at = text.index(b"\n") + 1
            return text[max(0, at - settings.prompt) : at], text[at : at + settings.answer]
        at = int(draw.integers(settings.prompt, len(text) - settings.answer))
        return text[at - settings.prompt : at], text[at : at + settings.answer]

    made = 0
    while made < count:
        (prompt, right), *others = [piece() for _ in range(4)]
        offered = [_plain(right), *(_plain(answer) for _, answer in others)]
        asked = _plain(TAGS[task] + prompt)
        if None in (asked, *offered) or len(set(offered)) < 4 or not all(offered):
            continue
        order = draw.permutation(4)
        made += 1
        yield {"question": asked, "choices": [offered[at] for at in order], "answer": int(np.argmin(order))}


def _plain(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


# --- training ----------------------------------------------------------------------------------------


def stream(data: Corpus, tasks: Sequence[str], settings: Training, seed: int) -> Iterator[Tensor]:
    """Endless batches, an equal number of windows from each task."""
    draw = np.random.default_rng(seed)
    share = settings.batch // len(tasks)
    while True:
        parts = [windows(tuple(data[t]["train"]), TAGS[t], share, settings.context, draw) for t in tasks]
        yield torch.cat(parts)


def fit(
    model: nn.Module, batches: Iterator[Tensor], steps: int, rate: float, reach: float | None = None
) -> tuple[int, float]:
    """Train in place until `steps`, or until it has moved `reach` of where it began; returns (steps, moved)."""
    began = [parameter.detach().clone() for parameter in model.parameters()]
    size = sum(float(one.square().sum()) for one in began) ** 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    model.train()
    moved = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (warm_up_then_cosine(step, steps) if reach is None else min(1.0, (step + 1) / 20))
        rows = next(batches)
        optimizer.zero_grad()
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            pairs = zip(model.parameters(), began, strict=True)
            moved = sum(float((p - b).square().sum()) for p, b in pairs) ** 0.5 / size
        if reach is not None and moved >= reach:
            return step + 1, moved
    return steps, moved


def train(folder: Path, data: Corpus, seed: int, settings: Training, say: Callable[[str], None]) -> None:
    """Write base, experts, joint model and the questions."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    tasks = tuple(data)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=settings.hidden, intermediate_size=settings.mlp,
            num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads, max_position_embeddings=settings.context,
            bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip

    def run(name: str, kinds: Sequence[str], steps: int, rate: float, reach: float | None = None) -> None:
        place, partial = folder / name, folder / f"{name}.partial"
        if place.is_dir():  # of a run that was stopped; equal seeds give equal models
            model.load_state_dict(load_file(place / "model.safetensors"))
            return
        tag = 100 * seed + ["base", "joint", *TAGS].index(name)
        took, moved = fit(model, stream(data, kinds, settings, tag), steps, rate, reach)
        say(f"{name}, {took} steps, moved {100 * moved:.1f}%")
        model.save_pretrained(partial)
        partial.rename(place)

    run("base", tasks, settings.base_steps, settings.base_rate)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    for task in tasks:
        model.load_state_dict(base)
        run(task, (task,), settings.expert_steps, settings.expert_rate, settings.displacement)
    model.load_state_dict(base)
    run("joint", tasks, settings.joint_steps, settings.expert_rate)
    for split, count in (("validation", settings.validation), ("test", settings.test)):
        for task in tasks:
            made = questions(task, data[task][split], count, settings, seed)
            text = "".join(json.dumps(one) + "\n" for one in made)
            (folder / f"{task}.{split}.jsonl").write_text(text, "utf-8")


def family(home: Path, texts_home: Path, data_folder: Path | None, seed: int, say: Callable[[str], None]) -> Path:
    """The folder of a seed's checkpoints and questions; trained if they are not there yet."""
    import transformers

    settings, data = Training(), texts(texts_home, data_folder)
    held = [fingerprint(text.hex()) for task in data for split in data[task] for text in data[task][split]]
    versions = (torch.__version__, transformers.__version__)
    key = fingerprint(asdict(settings), seed, versions, held, Path(__file__).read_text("utf-8"))
    place = home / "questions" / f"seed{seed}-{key}"
    if not place.is_dir():
        partial = place.with_name(place.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        train(partial, data, seed, settings, say)
        partial.rename(place)
    return place
