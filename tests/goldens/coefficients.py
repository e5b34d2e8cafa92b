"""Golden cases of learned coefficients: what is merged once they are known, from a file of coefficients."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goldens import tiny_llama
from weightsmith import merge
from weightsmith.recipe.table import write_table

State = dict[str, Tensor]
RAW = "raw_coefficients"


def adamerging(case: Any) -> State:
    """`raw_coefficients`: a row for all tensors (granularity task), or one for each (layer); clamped on their way."""
    p, raw = case.params, case.expected[RAW]
    names = list(tiny_llama.shapes())
    if bounds := p.get("clamp"):
        raw = raw.clamp(*bounds)
    if p.get("tie_weights"):
        raw = raw.softmax(dim=-1)
    if p.get("normalize"):
        raw = raw / raw.sum(dim=-1, keepdim=True)
    assert len(raw) == (1 if p.get("granularity") == "task" else len(names))
    rows = dict(zip(names, raw.expand(len(names), -1), strict=True))
    keep = p.get("keep_percent")
    before = [] if keep is None else [{"agree": {"density": keep / 100 if keep > 1 else keep}}]
    return _merged(case, [*before, {"task_arithmetic": {}}], "weight", rows) | {RAW: case.expected[RAW]}


def expert_merging(case: Any) -> State:
    """`logits/<tensor>`: [experts, chunks]; tensors without keep the base, or the start where they are frozen there."""
    p, given = case.params, case.expected
    logits = {name: t for name, t in given.items() if name.startswith("logits/")}
    rows = {name.removeprefix("logits/"): t.sigmoid() for name, t in logits.items()}
    for name, count in p["chunks"].items():
        if count <= 0 and name not in rows:
            rows[name] = torch.full((case.count, 1), p.get("init", 0.1))
    left = [n for n in case.base if n not in rows or any(re.match(pattern, n) for pattern in p["exclude"])]
    return _merged(case, [{"scale": {}}, {"task_arithmetic": {}}], "factor", rows, left) | logits


def _merged(case: Any, method: list[Any], parameter: str, rows: State, exclude: list[str] | None = None) -> State:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coefficients.safetensors"
        write_table(path, tuple(case.experts), {parameter: rows})
        return merge(case.experts, method, case.base, exclude=exclude or (), **{parameter: {"file": str(path)}})
