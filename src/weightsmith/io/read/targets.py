"""The base's tensors that an adapter's names stand for, among them output layers that share the embedding's weight.

peft leaves a tied output layer alone unless the adapter names it: what is trained at the embedding changes the
embedding, and the head stays what the base had.  The result is then no longer tied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from weightsmith.core.errors import SourceError, nearest, some
from weightsmith.core.keys import Key, role_of
from weightsmith.core.lazy import torch
from weightsmith.io.read.adapter import ties_for_good
from weightsmith.io.read.changes import Change, Changes
from weightsmith.io.read.lora import Adapter, parameter_name
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.source import Source
from weightsmith.io.read.untied import SHARED_SAYS, bias_of, bias_twin, shares, tables

__all__ = ["Targets"]


@dataclass(frozen=True)
class Tie:
    """The output layer and the embedding that are one tensor, and which of the two names the base lists."""

    head: str
    embedding: str
    listed: str

    @property
    def shown(self) -> str:
        """The other one."""
        return self.head if self.listed == self.embedding else self.embedding


class Targets:
    """Names of an adapter -> keys of its base.  `virtual` holds those of a head that the base ties."""

    def __init__(self, adapter: Adapter, base: Source, modules: Modules) -> None:
        self.adapter, self.base, self.modules = adapter, base, modules
        self.virtual: dict[str, Key] = {}

    def weight(self, module: str, parameter: str, stored: str) -> Key:
        """The key of a module's weight (or other parameter)."""
        root = parameter_name(module, "weight")
        names = [f"{root}.{parameter}"]
        if parameter == "weight":
            names.append(f"{root}.in_proj_weight")  # of torch's MultiheadAttention
        for name in names:
            if (key := self._found(name)) is not None:
                return key
        raise self._unknown(stored, names[0])

    def whole(self, target: str, stored: str) -> Key | None:
        """The key of a tensor that is kept in full; None for a trained module that the base does not have."""
        if (key := self._found(target)) is not None:
            return key
        if self._saved(target):
            return None
        raise self._unknown(stored, target)

    def _found(self, name: str) -> Key | None:
        known = self.modules.stored(name)
        if known is not None and known in self.base.keys:
            return self.base.keys[known]
        tie = self.tie
        if tie is not None and tie.shown in (known, name):
            listed = self.base.keys[tie.listed]
            return self.virtual.setdefault(tie.shown, Key(tie.shown, listed.shape, listed.dtype))
        if tie is not None and name == bias_of(tie.head) and (plain := bias_twin(self.base, name)) is not None:
            return self.virtual.setdefault(name, replace(self.base.keys[plain], name=name))
        if known is not None:
            raise SourceError(
                f"{self.adapter.label}: changes {known!r}, which {self.base} ties to "
                f"{self.base.aliases[known]!r}; one cannot change without the other"
            )
        return None

    def _unknown(self, stored: str, target: str) -> SourceError:
        label, base = self.adapter.label, self.base.origin.label
        hint = nearest(target, self.base.keys)
        return SourceError(f"{label}: {stored!r} belongs to {target!r}, which {base} lacks{hint}")

    # --- output layers that share the embedding's weight ---

    @cached_property
    def tie(self) -> Tie | None:
        """The pair of embedding and output layer that the base stores once; None where it stores both, or has one."""
        for alias, listed in self.base.aliases.items():
            roles = (role_of(alias), role_of(listed))
            if set(roles) == {"embed", "head"}:
                return Tie(*((alias, listed) if roles[0] == "head" else (listed, alias)), listed=listed)
        layer = self.modules.output_layer
        if layer is None or not self.modules.ties or self.modules.stored(f"{layer}.weight") is not None:
            return None
        embedding = self._embedding
        return None if embedding is None else Tie(self.modules.in_files(f"{layer}.weight"), embedding, embedding)

    @property
    def _shared(self) -> bool:
        """Whether more than two layers share one weight: encoder, decoder, and output layer."""
        return shares(self.modules.config)

    @cached_property
    def _embedding(self) -> str | None:
        """The embedding of tokens: the one that is called so, else as many rows as the vocabulary has tokens.

        None where neither tells it from others.
        """
        config = self.modules.config
        scopes = [config, *(value for value in config.values() if isinstance(value, dict))]
        sizes = {scope["vocab_size"] for scope in scopes if isinstance(scope.get("vocab_size"), int)}
        found = [key for key in tables(self.base) if len(key.shape) == 2]
        alike = [key.name for key in found if key.rows in sizes] or [key.name for key in found]
        return alike[0] if len(alike) == 1 else None

    def settle(self, found: Changes) -> None:
        """Give a tied output layer a tensor of its own where it no longer is the embedding's."""
        self._refuse_shared(found)
        self._refuse_unknown(found)
        tie = self.tie
        if tie is None:
            return
        e, h = found.tensors.pop(tie.embedding, None), found.tensors.pop(tie.head, None)
        if e is None and h is None:
            return self._keep_bias(found, tie)
        grown = found.keys.pop(tie.embedding, None) or found.keys.pop(tie.head, None)
        found.keys.pop(tie.head, None)
        e, h = self._followed(*self._started(e, h))
        listed = self.base.keys[tie.listed]
        shape = listed.shape if grown is None else grown.shape
        if grown is not None:
            found.keys[tie.listed] = Key(tie.listed, shape, listed.dtype)
            if any(change is None or change.replacement is None for change in (e, h)):
                raise SourceError(
                    f"{self.adapter.label}: has one of embedding and output layer in {shape[0]} rows, which "
                    f"{self.base} ties, but not the other; save it with save_embedding_layers=True"
                )
        if self._alike(e, h):
            found.tensors[tie.listed] = e or Change()
            return self._keep_bias(found, tie)
        changes = {tie.embedding: e, tie.head: h}
        changes[tie.shown] = replace(changes[tie.shown] or Change(), of=tie.listed)
        found.tensors |= {name: change for name, change in changes.items() if change is not None}
        found.keys[tie.shown] = Key(tie.shown, shape, listed.dtype)
        found.untied = (tie.shown,)
        if self._shared:
            found.says.append(f"{tie.head} becomes a tensor of its own: {SHARED_SAYS}")
        else:
            self._settle_bias(found, tie)

    def _settle_bias(self, found: Changes, tie: Tie) -> None:
        """Give an untied output layer its bias under the name that its class loads then."""
        bias = bias_of(tie.head)
        plain = bias_twin(self.base, bias)
        if plain is not None:
            own = found.tensors.get(bias) or found.tensors.get(plain, Change())
            found.tensors[bias] = replace(own, of=plain)
            found.keys[bias] = replace(self.base.keys[plain], name=bias)

    def _keep_bias(self, found: Changes, tie: Tie) -> None:
        """Give the bias of an output layer that stays tied the name that the base has for it."""
        bias = bias_of(tie.head)
        plain, own = bias_twin(self.base, bias), found.tensors.get(bias)
        if plain is None or own is None:
            return
        if not self._equal(found.tensors.get(plain, own).replacement, own.replacement):
            raise SourceError(f"{self.adapter.label}: changes {bias!r} and {plain!r}, which {self.base} ties, unlike")
        found.tensors[plain] = found.tensors.pop(bias)

    def _refuse_unknown(self, found: Changes) -> None:
        """Refuse a change of an embedding that may or may not be the tied one."""
        nested = self._shared and self.modules.output_layer is None  # a decoder of its own inside, with its own ties
        if self.tie is not None or self._embedding is not None or not (self.modules.ties or nested):
            return
        names = {key.name for key in tables(self.base)}
        changed = [name for name in found.tensors if name in names]
        if changed:
            raise SourceError(
                f"{self.adapter.label}: changes {changed[0]!r}; which of {some(sorted(names))} the output layer of "
                f"{self.base} is tied to cannot be told, so the change may be its change too; untie the base first"
            )

    def _refuse_shared(self, found: Changes) -> None:
        if not self._shared or not (self.modules.ties or self.base.aliases):
            return
        shared = [name for name in found.tensors if role_of(name) == "embed" and name == self._embedding]
        if shared:
            raise SourceError(
                f"{self.adapter.label}: changes {shared[0]!r}, which encoder, decoder and output layer of "
                f"{self.base} share; peft changes one of them alone, which no merged weight can hold"
            )

    def _started(self, e: Change | None, h: Change | None) -> tuple[Change | None, Change | None]:
        """Both start from the copy of the base's weight that peft may have stored with one of them."""
        for one, other in ((e, h), (h, e)):
            copy = one.replacement if one is not None and not self._trained(one) else None
            if copy is not None and (other is None or other.replacement is None):
                other = replace(other or Change(), replacement=copy)
                return (one, other) if one is e else (other, one)
        return e, h

    def _trained(self, change: Change) -> bool:
        """Whether a tensor that is stored whole was trained, rather than kept as it was."""
        stored = change.replacement or ""
        return ".modules_to_save." in stored or self._saved(stored)

    def _saved(self, name: str) -> bool:
        """Whether a tensor is of a module that peft trains whole: one whose name ends so (`pre_classifier` does)."""
        pieces = name.split(".")[:-1]
        modules = [".".join(pieces[: i + 1]) for i in range(len(pieces))]
        saved = self.adapter.config.get("modules_to_save") or ()
        return any(module.endswith(str(name)) for module in modules for name in saved)

    def _followed(self, e: Change | None, h: Change | None) -> tuple[Change | None, Change | None]:
        """What peft trains for both although it stores it once."""
        learnt = [c is not None and (c.computed or self._trained(c)) for c in (e, h)]
        if ties_for_good(self.adapter.config) and learnt in ([True, False], [False, True]):
            both = e if learnt[0] else h
            if both is not None and (both is e or both.rows is None):  # tokens of the head alone stay its own
                return both, both
        if e is not None and e.rows is not None and (h is None or h.rows is None):
            return e, replace(h or Change(), rows=e.rows)  # trained tokens are those of both
        return e, h

    def _alike(self, e: Change | None, h: Change | None) -> bool:
        """Whether the embedding and the output layer are still one weight."""
        if e is None or h is None or (e.rows is None) != (h.rows is None) or (e.update is None) != (h.update is None):
            return False
        if not self._equal(e.replacement, h.replacement):
            return False
        if e.rows and h.rows and (e.rows.indices != h.rows.indices or not self._equal(e.rows.stored, h.rows.stored)):
            return False
        if e.update is None or h.update is None:
            return True
        if e.scale != h.scale or e.magnitude is not None or h.magnitude is not None:
            return False
        one, two = e.update.load(self.adapter.file, e.flip), h.update.load(self.adapter.file, h.flip)
        return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    def _equal(self, one: str | None, two: str | None) -> bool:
        if one is None or two is None or one == two:
            return one == two
        a, b = (self.adapter.file.bits(name) for name in (one, two))
        return a.dtype == b.dtype and np.array_equal(a, b)
