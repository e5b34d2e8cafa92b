"""Metrics of tasks: means over examples, in percent where they are shares.  Higher is better but for rmse and mae."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import RecipeError

__all__ = ["LOWER", "METRICS", "OF_KIND", "score"]

LOWER = frozenset({"rmse", "mae"})
OF_KIND: Mapping[str, tuple[str, ...]] = {
    "label": ("accuracy",),
    "text": ("exact", "rouge_l", "f1", "set_f1", "bleu"),
    "map": ("psnr", "rmse", "mae"),
}
"""Kind of answer -> its metrics; the first is the default."""


def score(metric: str, found: Sequence[Any], wanted: Sequence[Any], valid: Sequence[Tensor] | None = None) -> float:
    """The metric of answers; `valid`: which pixels of maps count."""
    if not wanted:
        raise RecipeError("no examples to score")
    if metric in ("psnr", "rmse", "mae"):
        return _of_maps(metric, found, wanted, valid)
    if metric == "bleu":
        return _bleu(found, wanted)
    each = METRICS[metric]
    return 100 * sum(each(a, b) for a, b in zip(found, wanted, strict=True)) / len(wanted)


def _f1(found: Sequence[object], wanted: Sequence[object]) -> float:
    same = sum((Counter(found) & Counter(wanted)).values())
    if not found or not wanted:
        return float(found == wanted)
    return 2 * same / (len(found) + len(wanted))


def _rouge_l(found: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words."""
    a, b = found.lower().split(), wanted.lower().split()
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b):
            row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
    return 2 * row[-1] / (len(a) + len(b)) if a and b else float(a == b)


def _set(text: str) -> list[str]:
    """Entries of a list such as "aspirin drug, fever symptom"."""
    return sorted({" ".join(part.lower().split()) for part in text.replace(";", ",").split(",")} - {""})


METRICS: Mapping[str, Callable[[Any, Any], float]] = {
    "accuracy": lambda a, b: float(a == b),
    "exact": lambda a, b: float(" ".join(a.split()) == " ".join(b.split())),
    "f1": lambda a, b: _f1(a.lower().split(), b.lower().split()),
    "set_f1": lambda a, b: _f1(_set(a), _set(b)),
    "rouge_l": _rouge_l,
}


def _bleu(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Corpus BLEU-4 in percent: one reference each, words at spaces, no smoothing (Papineni et al. 2002)."""
    pairs = [(a.split(), b.split()) for a, b in zip(found, wanted, strict=True)]
    logs = 0.0
    for n in range(1, 5):
        grams = [[Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in pair] for pair in pairs]
        same, total = sum(sum((a & b).values()) for a, b in grams), sum(sum(a.values()) for a, _ in grams)
        if not same:
            return 0.0
        logs += math.log(same / total) / 4
    short = sum(len(b) for _, b in pairs) / max(sum(len(a) for a, _ in pairs), 1)
    return 100 * math.exp(min(0.0, 1 - short) + logs)


def _of_maps(metric: str, found: Sequence[Tensor], wanted: Sequence[Tensor], valid: Sequence[Tensor] | None) -> float:
    """Over all pixels that count, of all maps together."""
    used = valid or [torch.ones_like(w, dtype=torch.bool) for w in wanted]
    off = torch.cat([(f.cpu() - w.cpu())[v.cpu()].double() for f, w, v in zip(found, wanted, used, strict=True)])
    if not len(off):
        raise RecipeError("no pixel of these maps is valid")
    square = float(off.square().mean())
    if metric == "mae":
        return float(off.abs().mean())
    return math.sqrt(square) if metric == "rmse" else -10 * math.log10(max(square, 1e-12))
