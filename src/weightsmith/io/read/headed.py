"""Heads that only experts have: classifiers trained on a language model whose base has no such module.

The result is then a classifier: it has the head, no longer the output layer over tokens, and a config.json that says
so.  The base and models without the head are shown with the expert's, so that merging leaves it as it was trained.
Where several experts trained one, they are shown with the mean of these, which is what the result gets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import SourceError, some
from weightsmith.core.keys import Key, layer_of
from weightsmith.core.lazy import torch
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.shell import shell_of
from weightsmith.io.read.source import MemorySource, Source
from weightsmith.io.read.views import JoinedSource

if TYPE_CHECKING:
    from weightsmith.io.read.lora import Adapter

__all__ = [
    "HeadedSource",
    "HeadsError",
    "headed",
    "headed_config",
    "is_classifier",
    "labels_of",
    "of_tokens",
    "untrained",
]

_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_TRAINED = (*_CLASSES.values(), "ForImageClassification", "ForAudioClassification", "ForMultipleChoice")
"""Endings of classes whose heads are trained on a base that has none."""
_ENDING = re.compile(r"(For\w+|LMHeadModel|DoubleHeadsModel|Model)$")
_OF_HEADS = re.compile(r"architectures|id2label|label2id|num_labels|problem_type|classifier_\w+|summary_\w+")
"""Fields of config.json that belong to a head."""


class HeadsError(SourceError):
    """Heads that do not go together; `owners` are the models that have them."""

    def __init__(self, text: str, owners: Sequence[str]) -> None:
        super().__init__(text)
        self.owners = tuple(owners)


def is_classifier(adapter: Adapter) -> bool:
    """Whether an adapter makes another kind of model of its base."""
    return adapter.config.get("task_type") in _CLASSES


def labels_of(config: Mapping[str, Any]) -> list[str]:
    """What a config.json calls its labels, in the order of their numbers; empty where they have no names."""
    named = config.get("id2label")
    if not isinstance(named, dict) or not all(str(number).isdecimal() for number in named):
        return []
    names = [str(name) for _, name in sorted(named.items(), key=lambda pair: int(pair[0]))]
    return [] if all(name.startswith("LABEL_") for name in names) else names


def of_tokens(source: Source, modules: Modules) -> frozenset[str]:
    """The tensors of the output layer over tokens, which a model with another head does not have."""
    root = (modules.output_layer or "").partition(".")[0]
    names = (*source.keys, *source.aliases)
    return frozenset(name for name in names if root and modules.in_memory(name).startswith(f"{root}."))


def headed_config(text: str, adapter: Adapter, heads: Sequence[Key]) -> str:
    """The base's config.json as the adapter's head needs it: the class, and the number of labels."""
    config = json.loads(text)
    ending = _CLASSES.get(str(adapter.config.get("task_type")))
    if ending is None:
        return text
    names = config.get("architectures") or []
    config["architectures"] = [_ENDING.sub(ending, name, count=1) for name in names if isinstance(name, str)]
    matrices = [key for key in heads if len(key.shape) == 2]
    labels = next((key.rows for key in reversed(matrices) if key.rows != key.row_numel), _square(matrices))
    if labels is not None and ending != "ForQuestionAnswering" and len(config.get("id2label") or ()) != labels:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
        config.pop("num_labels", None)
    return json.dumps(config, indent=2) + "\n"


def _square(matrices: Sequence[Key]) -> int | None:
    """Labels of a head whose matrices are all square; where others are not, layers before the last one are."""
    return matrices[-1].rows if matrices else None


def untrained(text: str, names: Iterable[str]) -> list[str]:
    """Parameters outside the blocks that a config.json's class has and a model with these tensors lacks.

    Empty where transformers is not there to tell.
    """
    shell = shell_of(json.dumps(json.loads(text), sort_keys=True))
    if shell is None:
        return []
    have = {shell.renamed(name) for name in names}
    every = (name for name, _ in shell.model.named_parameters())
    return [name for name in every if name not in have and layer_of(name) is None]


def _replaced(source: Source, modules: Modules) -> frozenset[str]:
    """The tensors that a model with another head may lack: of the output layer over tokens, and of pooling layers.

    transformers leaves the pooling layer out of most classes with a head (`add_pooling_layer=False`).
    """
    names = (*source.keys, *source.aliases)
    return of_tokens(source, modules) | {name for name in names if "pooler" in name.split(".")}


@dataclass(frozen=True)
class _Owner:
    """A model with a trained head that the base lacks.

    heads  names of its tensors
    whole  whether it is a full model, which its own config.json describes
    """

    name: str
    source: Source
    heads: tuple[str, ...]
    whole: bool = False

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return Modules(self.source).config

    @property
    def labels(self) -> list[str]:
        """What its own config.json calls its labels."""
        return labels_of(self.config) if self.whole else []


class HeadedSource(JoinedSource):
    """A model with the head of others, and without the tensors that they do not have.

    held  the head's tensors
    """

    shows = "headed"

    def __init__(self, source: Source, owners: Sequence[_Owner], held: Source) -> None:
        lender = owners[0]
        names = (*source.keys, *source.aliases)
        there = lender.source
        kept = {name: (0, name) for name in names if name in there.keys or name in there.aliases}
        config = _config(source, lender) if lender.whole else there.origin.config
        several = len(owners) > 1
        origin = source.origin.beside(
            *(owner.source.origin for owner in owners),
            remarks=source.origin.remarks,
            config=config,
            heads=lender.heads if several else (),
        )
        super().__init__((source, held), kept | {name: (1, name) for name in lender.heads}, origin)
        self._owners = tuple(owner.source for owner in owners)

    def fingerprint(self) -> dict[str, Any]:
        heads = [owner.fingerprint() for owner in self._owners]
        return {"view": self.shows, "source": self.source.fingerprint(), "heads": heads if heads[1:] else heads[0]}


def headed(models: Mapping[str, Source]) -> dict[str, Source]:
    """The models, those without a head that experts trained shown with theirs.

    models  by name, the base called 'base'
    Errors: HeadsError where several experts trained heads that do not go together.
    """
    owners = [owner for name, source in models.items() if (owner := _owner(name, source, models.get("base")))]
    if not owners or len(owners) == len(models):
        return dict(models)
    first = owners[0]
    for other in owners[1:]:
        _check(first, other)
    held = first.source if len(owners) == 1 else _mean(owners)
    having = {owner.name for owner in owners}
    found = {name: s if name in having else HeadedSource(s, owners, held) for name, s in models.items()}
    shown = next(source for name, source in found.items() if name not in having)
    shown.origin = shown.origin.beside(remarks=(*shown.origin.remarks, *_remarks(owners, models)))
    return found


def _owner(name: str, source: Source, base: Source | None) -> _Owner | None:
    """The model as one with a head of its own, if it is one."""
    if source.origin.heads:
        return _Owner(name, source, source.origin.heads)
    if base is None or source is base or config_of(source) is None or config_of(base) is None:
        return None
    modules, ours = Modules(source), Modules(base)
    kinds = [_class_of(one.config) for one in (modules, ours)]
    names, known = {*source.keys, *source.aliases}, {*base.keys, *base.aliases}
    heads = tuple(name for name in source.keys if name not in known)
    same_backbone = known - names <= _replaced(base, ours) and bool(known & names)
    if not kinds[0].endswith(_TRAINED) or kinds[0] == kinds[1] or not heads or not same_backbone:
        return None
    return _Owner(name, source, heads, whole=True)


def _class_of(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _check(first: _Owner, other: _Owner) -> None:
    """Raise where the mean of two heads would mean nothing."""
    both = (first.name, other.name)
    pair = f"{first.name} and {other.name}"
    if {*first.heads} != {*other.heads}:
        raise HeadsError(
            f"{pair} trained heads of unlike kinds ({some(first.heads)}; {some(other.heads)}); leave one out", both
        )
    for head in first.heads:
        a, b = first.source.key(head).shape, other.source.key(head).shape
        if a[1:] == b[1:] and a != b:
            raise HeadsError(
                f"unlike heads: {head} has {a[0]} labels in {first.name} but {b[0]} in {other.name}; leave one out",
                both,
            )
        if a != b:
            raise HeadsError(f"unlike heads: {head} is {list(a)} in {first.name} but {list(b)} in {other.name}; "
                             "leave one out", both)  # fmt: skip
    named = [[label.lower() for label in owner.labels] for owner in (first, other)]
    if all(named) and named[0] != named[1]:
        raise HeadsError(
            f"unlike heads: the labels are {first.labels} in {first.name} but {other.labels} in {other.name} "
            "(id2label of config.json): the rows of their heads mean different things; leave one out",
            both,
        )


def _mean(owners: Sequence[_Owner]) -> MemorySource:
    """The mean of the heads, [rows, ...] each, in the first one's dtype."""
    found = {}
    for head in owners[0].heads:
        total = sum((owner.source.read(head).double() for owner in owners), torch.zeros((), dtype=torch.float64))
        found[head] = (total / len(owners)).to(getattr(torch, owners[0].source.key(head).dtype))
    return MemorySource(found, "the mean of the heads")


def _remarks(owners: Sequence[_Owner], models: Mapping[str, Source]) -> list[str]:
    first, heads, base = owners[0], some(owners[0].heads), models.get("base")
    gone = _replaced(base, Modules(base)) if base is not None and first.whole else frozenset()
    gone -= {*first.source.keys, *first.source.aliases}
    less, nor = [f"{word} {some(sorted(gone))}" if gone else "" for word in (", without", ", and no")]
    if len(owners) > 1:
        names = " and ".join(owner.name for owner in owners)
        return [f"lacks {heads}, which {names} have: the result has their mean, whatever the method{nor}"]
    if not first.whole or base is None:
        return []  # the adapter says it
    return [f"lacks {heads}, which {first.name} has: the result is a classifier with that head{less}"]


def _config(source: Source, lender: _Owner) -> str:
    """The config.json of a model as the head of another model needs it."""
    theirs = lender.config
    config = {n: v for n, v in Modules(source).config.items() if not _OF_HEADS.fullmatch(n)}
    config |= {name: value for name, value in theirs.items() if _OF_HEADS.fullmatch(name)}
    if config.get("pad_token_id") is None and theirs.get("pad_token_id") is not None:
        config["pad_token_id"] = theirs["pad_token_id"]
    return json.dumps(config, indent=2) + "\n"
