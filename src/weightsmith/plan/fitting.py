"""Whether the models have the same tensors, in the same shapes; what is wrong where they have not."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from weightsmith.core.errors import SourceError, nearest
from weightsmith.core.keys import Key, layer_of
from weightsmith.core.problem import Code, Problems, Tensors
from weightsmith.inputs import vocabulary
from weightsmith.inputs.opened import Inputs
from weightsmith.io.architectures import BUFFERS, CAUSAL_MASKS
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.source import Source
from weightsmith.io.read.untied import is_output_layer
from weightsmith.plan.carried import has

__all__ = ["Fitting"]

_COMPARED = 5000
"""Names up to which the nearest one is looked for: that takes time in their number."""


_BUFFER = re.compile("|".join(BUFFERS))
_MASK = re.compile(CAUSAL_MASKS)
_LABELS = frozenset(("score", "classifier", "qa_outputs"))
"""In names of heads with a row for each label, not for each token."""


class Fitting:
    """Compares the experts' tensors with those of the base, or of the first expert; notes problems.

    carried   tensors that the reference lacks and a rule keeps -> the first expert that has each
    label     how the reference is called
    numbered  whether the models are in the vocabulary that they are merged in: else rows are not compared
    """

    def __init__(self, inputs: Inputs, reference: Source, problems: Problems, *, numbered: bool = True) -> None:
        self.inputs, self.reference, self.problems, self.numbered = inputs, reference, problems, numbered
        self.name = "" if inputs.base is not None else next(iter(inputs.experts), "")
        self.label = self.name or "base"
        self.carried: dict[str, str] = {}
        self._strangers = frozenset(self._find_strangers())

    def everywhere(self, key: Key) -> bool:
        """Whether all experts hold this tensor in this shape; else a problem is noted."""
        fits = [self._fits(key, name, source) for name, source in self.inputs.experts.items()]  # all their problems
        return all(fits)

    def is_loose(self, key: Key) -> bool:
        """Whether a tensor is a buffer that some files have and others lack; then the reference's stays."""
        return _is_buffer(key) and not all(has(source, key.name) for source in self.inputs.experts.values())

    def _find_strangers(self) -> Iterator[str]:
        """Models of another type than the reference with none of its tensors, or none of its blocks'.

        One problem for each.  Outside the blocks names like lm_head.weight are those of many types.
        """
        kind = _kind(self.reference)
        for name, source in self.inputs.experts.items():
            other = _kind(source)
            if not (kind and other and kind != other):
                continue
            blocks = [one for one in self.reference.keys if layer_of(one) is not None]
            names = list(self.reference.keys)
            shared = any(has(source, one) for one in self.reference.keys)
            if shared and (not blocks or any(has(source, one) for one in blocks)):
                continue
            if not _renamed(names, source):
                text = (
                    f"{name} is another kind of model than {self.label} ({other}, not {kind}): no "
                    f"{'tensor of its blocks' if shared else 'tensor'} is in both; "
                )
                self.problems.say(Code.SURPLUS, name, f"{text}leave {name} out, or merge it with models of its kind")
                yield name

    def _fits(self, key: Key, name: str, source: Source) -> bool:
        if name in self._strangers:
            return False
        if not has(source, key.name):
            if key.role == "head" and self._other_heads(source):
                self.problems.share(Code.SURPLUS, key.name, (name, "head"), partial(self._unlike_heads, name))
                return False
            layer = is_output_layer(self.reference, key)
            if key.role == "head" and not layer:
                self.problems.share(Code.MISSING, key.name, (name, "head"), partial(self._headless, name))
                return False
            tied = layer and any(k.role == "embed" for k in source.keys.values())
            text = partial(self._missing, name, source, tied)
            self.problems.share(Code.MISSING, key.name, (name, tied), text)
            return False
        other = source.key(key.name)
        if other.shape != key.shape:
            self._shape(key, other, name)
        elif other.floating != key.floating:
            text = partial(self._dtype, key.dtype, other.dtype, name)
            self.problems.share(Code.DTYPE, key.name, (name, key.dtype, other.dtype), text)
        else:
            return True
        return False

    def extra_tensors(self, keeps: Callable[[Key], bool]) -> None:
        """Tensors that the reference lacks: carried over where a rule keeps them, else refused."""
        for name, source in self.inputs.experts.items():
            other = source is not self.reference and name not in self._strangers
            for key in source.keys.values() if other else ():
                there, tied = has(self.reference, key.name), key.name in self.reference.aliases
                if there and not tied:
                    continue  # of a large model nearly all, and asking what becomes of a tensor takes time
                kept = key.name in self.carried or keeps(key)
                if not kept and not there and is_output_layer(source, key):
                    text = f"{key.name} is a tensor of its own in {name}, but {self.label} has none, or uses "
                    self.problems.say(Code.TIED, key.name, text + f"its embedding in another way; leave {name} out")
                elif not kept and tied:
                    text = f"{key.name} is tied to {self.reference.aliases[key.name]} in {self.label} but a "
                    more = f'tensor of its own in {name}; to leave it tied add it to "exclude"'
                    self.problems.say(Code.TIED, key.name, text + more)
                elif not there and kept:
                    self.carried.setdefault(key.name, name)
                elif self._new_head(key):
                    self.problems.share(Code.SURPLUS, key.name, (name, "head"), partial(self._unlike_heads, name))
                elif not there and not _is_buffer(key):
                    self.problems.share(Code.SURPLUS, key.name, name, partial(self._surplus, name))

    def _other_heads(self, source: Source) -> bool:
        """Whether a model has a head that the reference lacks."""
        return any(map(self._new_head, source.keys.values()))

    def _new_head(self, key: Key) -> bool:
        """Whether a tensor is of a head that the reference lacks, not of its own under a longer name."""
        if key.role != "head" or has(self.reference, key.name):
            return False
        return not any(k.role == "head" and key.name.endswith(f".{k.name}") for k in self.reference.keys.values())

    # -- texts

    def _unlike_heads(self, name: str, tensors: Tensors) -> str:
        way = "name the model that it was trained from as the base, or " if self.inputs.base is None else ""
        carry = ""
        if not any(key.role == "head" for key in self.reference.keys.values()):
            carry = f', or carry {tensors["it|them"]} over unchanged: add {tensors["it|them"]} to "exclude"'
        return (
            f"{name} is another kind of model than {self.label}, with another head ({tensors}); {way}leave {name} out"
            f"{carry}"
        )

    def _headless(self, name: str, tensors: Tensors) -> str:
        way = "name the model that both were trained from as the base, or " if self.inputs.base is None else ""
        it = tensors["it|them"]
        return (
            f"{name} lacks {tensors}, a head that {self.label} has; {way}leave {name} out, or keep {it} from "
            f'{self.name or "the base"}: add {it} to "exclude"'
        )

    def _missing(self, name: str, source: Source, tied: bool, tensors: Tensors) -> str:
        it = tensors["it|them"]
        why = "; it may be tied to the embedding there" if tied else _renamed(tensors.names, source)
        keep = f'; to keep {it} from {self.name or "the base"} add {it} to "exclude"'
        return f"{tensors} {tensors['is|are']} missing in {name} ({source}){why}{keep}"

    def _dtype(self, here: str, there: str, name: str, tensors: Tensors) -> str:
        return f"{tensors} {tensors['is|are']} {here} in {self.label} but {there} in {name}"

    def _surplus(self, name: str, tensors: Tensors) -> str:
        hint = ""
        if len(tensors.names) == 1 and len(self.reference.keys) < _COMPARED:
            hint = nearest(tensors.names[0], self.reference.keys)
        it = tensors["it|them"]
        return (
            f"{tensors} {tensors['is|are']} in {name} but not in {self.label}; to carry {it} over unchanged "
            f'add {it} to "exclude"{hint}'
        )

    def _shape(self, key: Key, other: Key, name: str) -> None:
        a, b = list(key.shape), list(other.shape)
        if a[1:] == b[1:] and _LABELS.intersection(key.name.split(".")):
            return self._labels(key, other, name)
        if vocabulary.is_of_tokens(key) and (a[1:] == b[1:] or a[:-1] == b[:-1] == [1]):
            models = {self.label: self.reference, name: self.inputs.experts[name]}
            unsolved = any(problem.code is Code.TOKENIZER for problem in self.inputs.problems)  # first that one
            if self.numbered and not unsolved:
                self.problems.add(vocabulary.rows_problem(models))
            return

        def text(tensors: Tensors) -> str:
            what = f"{tensors} has shape {a} in {self.label} but {b} in {name}"
            if len(tensors.names) > 1:
                what = f"{tensors} have other shapes in {self.label} than in {name} (the first: {a} and {b})"
            return f'{what}; to keep {tensors["the one|those"]} of {self.label} add {tensors["it|them"]} to "exclude"'

        self.problems.share(Code.SHAPE, key.name, name, text)

    def _labels(self, key: Key, other: Key, name: str) -> None:
        a, b = key.rows, other.rows

        def text(tensors: Tensors) -> str:
            return (
                f"unlike heads: {tensors} {tensors['has|have']} {a} labels in {self.label} but {b} in {name}; to keep "
                f'{tensors["the one|those"]} of {self.label} add {tensors["it|them"]} to "exclude", or merge models '
                "with the same labels"
            )

        self.problems.share(Code.SHAPE, key.name, (name, a, b), text)


def _kind(source: Source) -> str:
    """The model_type of a model's config.json; '' where none is said."""
    with contextlib.suppress(SourceError, OSError, ValueError, AttributeError, RecursionError):
        return str(json.loads(config_of(source) or "{}").get("model_type", ""))
    return ""


def _is_buffer(key: Key) -> bool:
    return bool(_BUFFER.fullmatch(key.name) or (len(key.shape) == 4 and _MASK.fullmatch(key.name)))


def _renamed(names: Sequence[str], source: Source) -> str:
    """What to say of several missing tensors that are there under another prefix; '' if they are not."""
    first = names[0]
    longer = next((known for known in source.keys if known.endswith(f".{first}")), None)
    if len(names) > 1 and longer is not None:
        prefix = longer[: -len(first)]
        if all(prefix + name in source.keys for name in names):
            return f"; their names begin with {prefix!r} there (names: {{{prefix!r}: ''}} maps them)"
    shorter = next((known for known in source.keys if first.endswith(f".{known}")), None)
    if len(names) > 1 and shorter is not None:
        prefix = first[: -len(shorter)]
        if all(name.startswith(prefix) and name.removeprefix(prefix) in source.keys for name in names):
            return f"; their names lack {prefix!r} there (names: {{'': {prefix!r}}} beside that model maps them)"
    return ""
