"""CoDiEmb: an encoder for retrieval and graded similarity at once, beside the same losses on mixed batches.

A small encoder of groups of letters learns from scratch to find the second half of a problem (GSM8K), to tell which two
draws of words come from the same speech (Shakespeare), and to grade sentences by the share of their long words that
another keeps.  Figures are of test texts: the share of queries whose passage is the nearest of 300, and Spearman's
correlation of cosines with grades.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from study.train.cells import Figures, Room, table
from weightsmith.train.embed import TaskBatches, info_nce, similarity

__all__ = ["study"]

SEEDS, STEPS, BATCH, TESTS = (0, 1, 2, 3, 4), 600, 48, 300
WIDTH, BUCKETS, RATE = 64, 4096, 3e-3
TASKS = ("problems", "speeches", "grades")
Row = tuple[str, str, float]


def pairs(data: Path) -> dict[str, dict[str, list[Row]]]:
    """Task -> part -> (text, text, grade); of retrieval the grade is 5."""
    lines = [json.loads(line) for line in (data / "gsm8k_train.jsonl").read_text("utf-8").splitlines()]
    speeches = [
        " ".join(s.split(":\n", 1)[-1].split())[:90] for s in (data / "tinyshakespeare.txt").read_text().split("\n\n")
    ]
    draw = np.random.default_rng(0)
    graded = []
    for n, row in enumerate(lines[3000:6000]):
        words, share = row["question"].split()[:12], n % 5 / 4
        other = lines[int(draw.integers(0, 3000))]["question"].split()
        kept = [draw.random() < (share if len(word) > 4 else 0.5) for word in words]
        mixed = [word if kept[i] else other[i % len(other)] for i, word in enumerate(words)]
        long = [kept[i] for i, word in enumerate(words) if len(word) > 4]
        graded.append((" ".join(words), " ".join(mixed), 5 * sum(long) / max(len(long), 1)))
    texts = [row["question"] for row in lines[:3000]]
    drawn = [tuple(_some(speech.split(), draw) for _ in range(2)) for speech in speeches if len(speech) > 60]
    found = {
        "problems": [(text[: len(text) // 2], text[len(text) // 2 :], 5.0) for text in texts],
        "speeches": [(one, other, 5.0) for one, other in drawn if one and other],
        "grades": graded,
    }
    order = {task: draw.permutation(len(rows)) for task, rows in found.items()}
    return {
        task: {"test": [rows[i] for i in order[task][:TESTS]], "train": [rows[i] for i in order[task][TESTS:]]}
        for task, rows in found.items()
    }


def _some(words: Sequence[str], draw: np.random.Generator) -> str:
    """Two words in five."""
    return " ".join(word for word in words if draw.random() < 0.4)


class Encoder(nn.Module):
    """A mean of the vectors of a text's groups of three letters, by their hash; then two layers.  [texts, WIDTH]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.bag = nn.EmbeddingBag(BUCKETS, WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, ids: Tensor, starts: Tensor) -> Tensor:
        mean: Tensor = self.bag(ids, starts)
        return mean + self.head(mean)


@cache
def groups(text: str) -> tuple[int, ...]:
    """Numbers of a text's groups of three bytes."""
    raw = f" {text} ".lower().encode()
    return tuple(crc32(raw[i : i + 3]) % BUCKETS for i in range(len(raw) - 2))


def embed(model: nn.Module, texts: Sequence[str]) -> Tensor:
    """[texts, WIDTH] of length 1."""
    rows = [groups(text) for text in texts]
    starts = np.cumsum([0, *map(len, rows[:-1])])
    return normalize(model(torch.tensor([i for row in rows for i in row]), torch.from_numpy(starts)), dim=1)


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
        order = [rows for epoch in range(20) for rows in (sampler.set_epoch(epoch), [*sampler])[1]]
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
    model = Encoder(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    count = room.steps(STEPS)
    batch = steps({task: data[task]["train"] for task in TASKS}, single, seed)
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * (1 - step / count)
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
    return table("percent", {"untrained": [measured(Encoder(seed).eval(), data) for seed in SEEDS], **rows},
                 (*TASKS, "mean of both kinds", "alike"), "{:.1f}")  # fmt: skip
