"""Classifiers of images."""

from __future__ import annotations

from pathlib import Path

import torch

from weightsmith.core.errors import SourceError
from weightsmith.observe.data import batches, read_examples
from weightsmith.observe.model import LoadedModel, resting
from weightsmith.study.evaluators.found import Found, of_examples
from weightsmith.study.evaluators.specs import Data
from weightsmith.study.evaluators.subject import Subject

__all__ = ["accuracy", "hits"]


def hits(loaded: LoadedModel, file: Path, batch: int = 64) -> list[bool]:
    """For every labelled image of an .npz file, whether its class is found."""
    examples = read_examples(file, loaded, examples=2**31)
    labels = [example.label for example in examples]
    if None in labels:
        raise SourceError(f"{file}: images without labels; an accuracy needs both")
    answers: list[int] = []
    with resting(loaded.module), torch.no_grad():
        for part in batches(examples, batch):
            answers += loaded.logits(part.inputs).argmax(-1).tolist()
    return [a == b for a, b in zip(answers, labels, strict=True)]


def accuracy(subject: Subject, spec: Data) -> Found:
    """Share of the images whose class is found."""
    found = hits(subject.loaded("image-classification"), Path(spec.file))
    return of_examples({"acc": [float(one) for one in found[: subject.setting.limit]]})
