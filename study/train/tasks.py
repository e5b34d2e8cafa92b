"""CoDiEmb: an encoder for retrieval and graded similarity at once, beside the same losses on mixed batches.

A small encoder of bytes learns from scratch to find the answer of a problem (GSM8K) and the speech that belongs to a
beginning (Shakespeare), and to grade sentences by the share of their long words that another keeps.  Figures are of
test texts: the share of queries whose passage is the nearest of 100, and Spearman's correlation of cosines with grades.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from study.train.cells import Figures, Room, table
from weightsmith.train.embed import TaskBatches, info_nce, similarity

__all__ = ["study"]

SEEDS, STEPS, BATCH, BYTES = (0,), 240, 24, 64
TASKS = ("problems", "speeches", "grades")
Row = tuple[str, str, float]


def pairs(data: Path) -> dict[str, dict[str, list[Row]]]:
    """Task -> part -> (text, text, grade); of retrieval the grade is 5."""
    lines = [json.loads(line) for line in (data / "gsm8k_train.jsonl").read_text("utf-8").splitlines()]
    speeches = [
        " ".join(s.split(":\n", 1)[-1].split()) for s in (data / "tinyshakespeare.txt").read_text().split("\n\n")
    ]
    speeches = [s for s in speeches if len(s) > 80]
    draw = np.random.default_rng(0)
    graded = []
    for n, row in enumerate(lines[3000:6000]):
        words, share = row["question"].split()[:12], n % 5 / 4
        other = lines[int(draw.integers(0, 3000))]["question"].split()
        kept = [draw.random() < (share if len(word) > 4 else 0.5) for word in words]
        mixed = [word if kept[i] else other[i % len(other)] for i, word in enumerate(words)]
        long = [kept[i] for i, word in enumerate(words) if len(word) > 4]
        graded.append((" ".join(words), " ".join(mixed), 5 * sum(long) / max(len(long), 1)))
    found = {
        "problems": [
            (text[:BYTES], text[BYTES : 2 * BYTES], 5.0) for row in lines[:3000] if len(text := row["question"]) > 90
        ],
        "speeches": [(s[: len(s) // 2][-BYTES:], s[len(s) // 2 :][:BYTES], 5.0) for s in speeches[:2500]],
        "grades": graded,
    }
    order = {task: draw.permutation(len(rows)) for task, rows in found.items()}
    return {
        task: {"test": [rows[i] for i in order[task][:100]], "train": [rows[i] for i in order[task][100:]]}
        for task, rows in found.items()
    }


def encoder(seed: int) -> nn.Module:
    """A two-layer transformer over bytes."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=257, max_position_embeddings=BYTES, pad_token_id=256, **sizes)
    return transformers.BertModel(config, add_pooling_layer=False)


def embed(model: nn.Module, texts: Sequence[str]) -> Tensor:
    """[texts, width] of length 1: means over bytes."""
    rows = [[*text.encode()[:BYTES]] for text in texts]
    ids = torch.full((len(rows), BYTES), 256)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    mask = (ids != 256).long()
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)


def loss(model: nn.Module, rows: Mapping[str, Sequence[Row]], own: bool) -> Tensor:
    """Of each task's rows by its own loss, or contrastive for all of them together; means over rows."""
    groups = [*rows.items()] if own else [("all", [row for task in rows.values() for row in task])]
    total, count = torch.zeros(()), 0
    for task, chosen in groups:
        a, b = (embed(model, [row[side] for row in chosen]) for side in (0, 1))
        grades = torch.tensor([row[2] for row in chosen])
        if task == "grades":
            value = similarity((a * b).sum(1), grades)
        else:  # a graded pair is a pair where it is near enough, as contrastive training takes such data
            near = grades >= 4
            value = info_nce(a[near], b[near][:, None], temperature=0.05) if bool(near.any()) else a.sum() * 0
        total, count = total + value * len(chosen), count + len(chosen)
    return total / count


def steps(data: Mapping[str, Sequence[Row]], single: bool, seed: int) -> Callable[[int], dict[str, list[Row]]]:
    """The rows of a step, as many for every way of mixing."""
    lengths = [len(data[task]) for task in TASKS]
    if single:
        sampler = TaskBatches(lengths, [BATCH] * 3, seed=seed)
        order = [rows for epoch in range(10) for rows in (sampler.set_epoch(epoch), [*sampler])[1]]
        ends = np.cumsum(lengths)

        def batch(step: int) -> dict[str, list[Row]]:
            task = int(np.searchsorted(ends, order[step][0], side="right"))
            start = int(ends[task]) - lengths[task]
            return {TASKS[task]: [data[TASKS[task]][i - start] for i in order[step]]}

        return batch
    draw = np.random.default_rng(seed)

    def mixed(step: int) -> dict[str, list[Row]]:
        tasks = draw.choice(3, BATCH, p=np.array(lengths) / sum(lengths))
        chosen = {
            TASKS[t]: [data[TASKS[t]][i] for i in draw.integers(0, lengths[t], int((tasks == t).sum()))]
            for t in range(3)
        }
        return {task: rows for task, rows in chosen.items() if len(rows) > 1}

    return mixed


WAYS: Mapping[str, tuple[bool, bool]] = {  # single-task batches, own losses
    "one contrastive loss, mixed batches": (False, False),
    "own losses, mixed batches": (False, True),
    "one contrastive loss, single-task batches": (True, False),
    "own losses, single-task batches (CoDiEmb)": (True, True),
}


def trained(room: Room, data: Mapping[str, Mapping[str, list[Row]]], single: bool, own: bool, seed: int) -> Figures:
    model = encoder(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    count = room.steps(STEPS)
    batch = steps({task: data[task]["train"] for task in TASKS}, single, seed)
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1 - step / count)
        optimizer.zero_grad()
        loss(model, batch(step), own).backward()
        optimizer.step()
    return measured(model.eval(), data)


@torch.no_grad()
def measured(model: nn.Module, data: Mapping[str, Mapping[str, list[Row]]]) -> Figures:
    """Of test rows, in percent; the spread is the mean cosine of unrelated texts."""
    found = {}
    for task in TASKS:
        a, b = (embed(model, [row[side] for row in data[task]["test"]]) for side in (0, 1))
        if task == "grades":
            ranks = [_ranks(x) for x in ((a * b).sum(1).numpy(), np.array([row[2] for row in data[task]["test"]]))]
            found[task] = 100 * float(np.corrcoef(*ranks)[0, 1])
        else:
            found[task] = 100 * float(((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean())
    alike = float((a @ a.T).fill_diagonal_(0).sum() / (len(a) * (len(a) - 1)))
    both = (mean([found["problems"], found["speeches"]]) + found["grades"]) / 2
    return {**found, "mean of both kinds": both, "alike": 100 * alike}


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.array([((values < value).sum() + (values <= value).sum()) / 2 for value in values])


def study(room: Room) -> str:
    """The table."""
    data = pairs(room.data)
    rows: dict[str, list[Figures]] = {way: [] for way in WAYS}
    for seed in SEEDS[: room.steps(len(SEEDS))]:
        for way, (single, own) in WAYS.items():
            measure = lambda s=single, o=own, seed=seed: trained(room, data, s, o, seed)  # noqa: E731
            rows[way].append(room.figures(f"tasks/{way}-{seed}", measure))
    return table("percent", {"untrained": [measured(encoder(0).eval(), data)], **rows},
                 (*TASKS, "mean of both kinds", "alike"), "{:.1f}")  # fmt: skip
