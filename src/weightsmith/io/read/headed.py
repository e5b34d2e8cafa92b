"""Heads that only an adapter has: a classifier trained on a language model whose base has no such module.

The result is then a classifier: it has the head, no longer the output layer over tokens, and a config.json that says
so.  The base and models without the head are shown with the adapter's, so that merging leaves it as it was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key
from weightsmith.io.read.source import Source
from weightsmith.io.read.views import RenamedSource

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.io.read.lora import Adapter

__all__ = ["HeadedSource", "headed", "headed_config", "is_classifier"]

_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_ENDING = re.compile(r"(For\w+|LMHeadModel|DoubleHeadsModel|Model)$")


def is_classifier(adapter: Adapter) -> bool:
    """Whether an adapter makes another kind of model of its base."""
    return adapter.config.get("task_type") in _CLASSES


def headed_config(text: str, adapter: Adapter, heads: Sequence[Key]) -> str:
    """The base's config.json as the adapter's head needs it: the class, and the number of labels."""
    config = json.loads(text)
    ending = _CLASSES.get(str(adapter.config.get("task_type")))
    if ending is None:
        return text
    names = config.get("architectures") or []
    config["architectures"] = [_ENDING.sub(ending, name, count=1) for name in names if isinstance(name, str)]
    labels = next((key.rows for key in reversed(heads) if len(key.shape) == 2), None)
    if labels is not None and ending != "ForQuestionAnswering" and len(config.get("id2label") or ()) != labels:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
        config.pop("num_labels", None)
    return json.dumps(config, indent=2) + "\n"


class HeadedSource(RenamedSource):
    """A model with the head of another, and without the tensors that the other does not have."""

    def __init__(self, source: Source, lender: Source, heads: Sequence[str]) -> None:
        kept = {name: name for name in (*source.keys, *source.aliases) if name in lender.keys or name in lender.aliases}
        super().__init__(source, kept)
        self.lender = lender
        self.heads = tuple(heads)
        self.keys = {**self.keys, **{name: lender.key(name) for name in heads}}

    def bits(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._holder(name).bits(*self._called(name), start, stop)

    def read_into(self, out: np.ndarray, name: str, start: int = 0, stop: int | None = None) -> None:
        self._holder(name).read_into(out, *self._called(name), start, stop)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._holder(name).read(*self._called(name), start, stop)

    def computes(self, name: str) -> bool:
        return self._holder(name).computes(*self._called(name))

    def read_cost(self, name: str) -> float:
        return self._holder(name).read_cost(*self._called(name))

    def _holder(self, name: str) -> Source:
        return self.lender if name in self.heads else self.source

    def _called(self, name: str) -> tuple[str]:
        return (name if name in self.heads else self.names[self.key(name).name],)

    def config_text(self) -> str | None:
        return self.lender.config_text()

    def places(self) -> tuple[Path, ...]:
        return (*self.source.places(), *self.lender.places())

    def fingerprint(self) -> dict[str, Any]:
        return {"view": "headed", "source": self.source.fingerprint(), "heads": self.lender.fingerprint()}


def headed(models: Mapping[str, Source]) -> dict[str, Source]:
    """The models, those without a head that an adapter trained shown with that adapter's.

    Raises SourceError where several adapters trained one, differently.
    """
    owners = {name: source for name, source in models.items() if source.beside is not None and source.beside.heads}
    if not owners or len(owners) == len(models):
        return dict(models)
    lender, first = next(iter(owners.items()))
    assert first.beside is not None
    heads = first.beside.heads
    for name, source in owners.items():
        for head in heads:
            if head not in source.keys or not _same(first, source, head):
                raise SourceError(
                    f"{lender} and {name} each trained a head of their own ({head}), and the base has none to compare "
                    "them with; leave one out, or give a base that has such a head"
                )
    return {
        name: source if all(head in source.keys for head in heads) else HeadedSource(source, first, heads)
        for name, source in models.items()
    }


def _same(one: Source, other: Source, name: str) -> bool:
    if one is other:
        return True
    a, b = one.key(name), other.key(name)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and np.array_equal(one.bits(name), other.bits(name))
