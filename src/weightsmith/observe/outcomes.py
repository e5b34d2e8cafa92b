"""What a running model makes of examples whose answers are known: losses and hits, one example at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from weightsmith.core.errors import SourceError
from weightsmith.observe.data import Example, batches
from weightsmith.observe.model import LoadedModel, resting

__all__ = ["fed", "outcomes"]


def fed(loaded: LoadedModel, examples: Sequence[Example], batch: int = 8) -> None:
    """Run the model once over examples, in the modes that its modules are in."""
    for part in batches(examples, batch):
        loaded.run(part.inputs, part.mask)


def outcomes(loaded: LoadedModel, examples: Sequence[Example], batch: int = 8) -> tuple[np.ndarray, ...]:
    """(loss, hits, count), each [n] float64: summed cross-entropy in nats, right predictions, and predictions.

    A language model predicts every token but an example's first; a classifier its label.
    Raises SourceError for examples without a label, and for kinds of models that predict neither.
    """
    found: list[np.ndarray] = []
    tokens = loaded.kind == "causal-lm"
    if not tokens and not loaded.kind.endswith(("image-classification", "sequence-classification")):
        raise SourceError(f"{loaded.label}: a model of the kind {loaded.kind} has no loss to measure here")
    if not tokens and any(example.label is None for example in examples):
        raise SourceError(f"{loaded.label}: examples without labels; a classifier's loss needs them")
    labels = [example.label for example in examples]
    with resting(loaded.module), torch.no_grad():
        start = 0
        for part in batches(examples, batch):
            logits = loaded.logits(part.inputs, part.mask).float().cpu()
            rows = slice(start, start + len(part.inputs))
            start = rows.stop
            targets: Any
            if tokens:
                targets, logits = part.inputs[:, 1:], logits[:, :-1]
                counted = torch.ones_like(targets, dtype=torch.bool) if part.mask is None else part.mask[:, 1:]
            else:
                targets, logits = torch.tensor(labels[rows])[:, None], logits[:, None]
                counted = torch.ones_like(targets, dtype=torch.bool)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            hits = (logits.argmax(-1) == targets) & counted
            sums = (
                (loss.reshape(targets.shape).double() * counted).sum(1),
                hits.sum(1).double(),
                counted.sum(1).double(),
            )
            found.append(torch.stack(sums).numpy())
    every = np.concatenate(found, axis=1)
    if not every[2].sum():
        raise SourceError("nothing to predict: every example is one token long")
    return tuple(every)
