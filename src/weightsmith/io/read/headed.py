"""Heads that only an adapter has: a classifier trained on a language model whose base has no such module.

The result is then a classifier: it has the head, no longer the output layer over tokens, and a config.json that says
so.  The base and models without the head are shown with the adapter's, so that merging leaves it as it was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key
from weightsmith.io.read.source import Source
from weightsmith.io.read.views import JoinedSource

if TYPE_CHECKING:
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


class HeadedSource(JoinedSource):
    """A model with the head of another, and without the tensors that the other does not have."""

    shows = "headed"

    def __init__(self, source: Source, lender: Source, heads: Sequence[str]) -> None:
        names = (*source.keys, *source.aliases)
        kept = {name: (0, name) for name in names if name in lender.keys or name in lender.aliases}
        origin = source.origin.beside(lender.origin, remarks=source.origin.remarks, config=lender.origin.config)
        super().__init__((source, lender), kept | {name: (1, name) for name in heads}, origin)

    def fingerprint(self) -> dict[str, Any]:
        return {"view": self.shows, "source": self.source.fingerprint(), "heads": self.parts[1].fingerprint()}


def headed(models: Mapping[str, Source]) -> dict[str, Source]:
    """The models, those without a head that an adapter trained shown with that adapter's.

    Raises SourceError where several adapters trained one, differently.
    """
    owners = {name: source for name, source in models.items() if source.origin.heads}
    if not owners or len(owners) == len(models):
        return dict(models)
    lender, first = next(iter(owners.items()))
    heads = first.origin.heads
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
