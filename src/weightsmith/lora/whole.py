"""What adapters keep in full: copied where they agree, averaged where that is asked for, else refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import PlanError, SourceError
from weightsmith.core.lazy import torch
from weightsmith.core.problem import Tensors
from weightsmith.io.read.lora import Adapter
from weightsmith.lora.compare import Adapters
from weightsmith.ops.combine import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["token_rows", "whole_tensors"]

Stored = dict[str, tuple["Tensor", str]]
"""Stored name -> (value, how it was made)."""


def whole_tensors(adapters: Adapters, weights: Sequence[float], *, averaged: bool) -> tuple[Stored, list[str]]:
    """Tensors that adapters keep in full (modules_to_save, trained biases), and what there is to say."""
    found: Stored = {}
    alone: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for adapter in adapters.values() for name in adapter.whole):
        who = {label: adapter for label, adapter in adapters.items() if name in adapter.whole}
        (label, first), *others = who.items()
        stored = first.whole[name]
        if all(_same(first, other, name) for _, other in others):
            found[stored] = first.tensor(name), f"copied from {label}"
            if len(who) < len(adapters):
                alone.setdefault(", ".join(who), []).append(name)
        elif averaged:
            own = [w for w, label in zip(weights, adapters, strict=True) if label in who]
            found[stored] = _mean([adapter.tensor(name) for adapter in who.values()], own, name), "weighted mean"
        else:
            raise PlanError([
                f"{name} is kept in full (modules_to_save or a trained bias) by {', '.join(who)}, differently; set the "
                "parameter saved: average for their weighted mean"
            ])  # fmt: skip
    return found, [
        f"{those} {those['is|are']} kept in full by {who} alone: copied, whatever the weights"
        for who, names in alone.items()
        for those in [Tensors(names)]
    ]


def token_rows(
    adapters: Adapters, weights: Sequence[float], *, averaged: bool
) -> tuple[Stored, dict[str, Any], list[str]]:
    """Rows of trained tokens, of all adapters that have some, the field of the configuration that names them, and
    what there is to say."""
    found: Stored = {}
    notes: list[str] = []
    indices: dict[str, list[int]] = {}
    for module in dict.fromkeys(name for adapter in adapters.values() for name in adapter.rows):
        who = [(label, adapter, weight) for (label, adapter), weight in zip(adapters.items(), weights, strict=True)
               if module in adapter.rows]  # fmt: skip
        rows: dict[int, list[tuple[Tensor, float]]] = {}
        for _, adapter, weight in who:
            own = adapter.rows[module]
            for token, row in zip(own.indices, adapter.file.read(own.stored), strict=True):
                rows.setdefault(token, []).append((row, weight))
        if any(len(trained) < len(adapters) for trained in rows.values()):
            labels = ", ".join(label for label, _, _ in who)
            notes.append(
                f"tokens of {module} were trained by {labels}, not each by all: copied in full, whatever the weights"
            )
        for token, trained in rows.items():
            if not averaged and any(not torch.equal(row, trained[0][0]) for row, _ in trained):
                raise PlanError([
                    f"token {token} of {module} was trained by {', '.join(label for label, _, _ in who)}, differently; "
                    "set the parameter saved: average for the weighted mean"
                ])  # fmt: skip
        value = torch.stack([_mean([r for r, _ in own], [w for _, w in own], module) for own in rows.values()])
        found[who[0][1].rows[module].stored] = value, "copied, or weighted mean"
        indices[module] = list(rows)
    return found, {"trainable_token_indices": indices} if indices else {}, notes


def _same(one: Adapter, other: Adapter, name: str) -> bool:
    a, b = (adapter.file.bits(adapter.whole[name]) for adapter in (one, other))
    return a.dtype == b.dtype and np.array_equal(a, b)


def _mean(tensors: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
    if all(t.shape == tensors[0].shape and torch.equal(t, tensors[0]) for t in tensors):
        return tensors[0]
    total = sum(weights)
    if abs(total) < 1e-8 or len({tuple(t.shape) for t in tensors}) > 1:
        raise SourceError(f"{name}: no mean of tensors whose weights sum to {total:g}, or whose shapes differ")
    stack = torch.stack([t.float() for t in tensors])
    return (weighted_sum(stack, weights) / total).to(tensors[0].dtype)
