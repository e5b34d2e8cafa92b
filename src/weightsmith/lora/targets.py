"""What an extracted adapter calls its modules, and which way round their weights are: as the model is in memory.

transformers renames while it loads, and peft knows names in memory only.  With transformers at hand it is asked, by an
empty shell of the model; else what `io.architectures` states counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from weightsmith.core.errors import PlanError
from weightsmith.core.keys import Key, role_of
from weightsmith.io.read.lora import ORDER, Module
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.orientation import kind_of
from weightsmith.io.read.source import Source
from weightsmith.io.read.untied import bias_twin, shares, tables
from weightsmith.io.read.updates import Experts, Product, Update
from weightsmith.lora.changes import Changes, holds_experts, is_embedding
from weightsmith.lora.naming import HEADS, stored_name, task_of

__all__ = ["Target", "Targets"]


@dataclass(frozen=True)
class Target:
    """A tensor that becomes factors; `flip`: it is stored [in, out], `twin`: the output layer that shares it."""

    key: Key
    module: Module
    flip: bool
    twin: Module | None = None

    @property
    def turned(self) -> bool:
        """Whether peft has to be told so: of embeddings and experts it knows, and refuses to be told of experts."""
        return self.flip and not self.module.embedding and not isinstance(self.module.update, Experts)


class Targets:
    """All that goes into the adapter, under its names in memory.

    low         what becomes factors
    whole       name -> key of what is kept in full
    saved       modules_to_save
    parameters  modules in `low` of a class that peft adapts by their parameter only (routers)
    """

    def __init__(self, chosen: Changes, tuned: Source, origin: Source, fan_in_fan_out: bool | None) -> None:
        self._chosen, self._tuned, self._origin = chosen, tuned, origin
        self._given = fan_in_fan_out
        self._modules = Modules(tuned)  # a classifier has other layers than the base that it was made of
        if not self._modules.config:
            self._modules = Modules(origin)
        self.config: Mapping[str, Any] = self._modules.config
        self.task = task_of(self.config)
        self.shell = self._modules.shell if find_spec("peft") is not None else None
        self._biased = self._orientation_of_biases()
        self.parameters: set[str] = set()
        self._wrapped = self._fused_modules()
        heads = {key.name: head for key in tuned.keys.values() if (head := self._classifier(key.name))}
        self.low = [self._target(module, key) for module, key in chosen.low.items() if key.name not in heads]
        self.whole = {self.called(key.name): key for keys in chosen.saved.values() for key in keys}
        for key in chosen.biases:  # a bias of an adapted module lies beneath peft's wrapper
            module, _, leaf = self.called(key.name).rpartition(".")
            self.whole |= {f"{module}.base_layer.{leaf}": key} if key.name not in heads else {}
        self._tie()
        self.whole |= {self.called(name): tuned.keys[name] for name in heads}
        roots = {self.called(name): head for name, head in heads.items()}
        saved = (roots.get(n) or n.rpartition(".")[0] for n in self.whole if ".base_layer." not in n)
        self.saved = tuple(dict.fromkeys(saved))

    def called(self, name: str) -> str:
        """A tensor's name in memory."""
        found = self._in_memory(name)
        if self.shell is not None and not self.shell.has(found):
            raise PlanError([
                f"{name} changed, but has no counterpart in a {type(self.shell.model).__name__} (transformers splits "
                f"or joins it when it loads): leave it out with --exclude {name}"
            ])  # fmt: skip
        return found

    def _in_memory(self, name: str) -> str:
        return self.shell.renamed(name) if self.shell is not None else self._modules.in_memory(name)

    def _classifier(self, name: str) -> str:
        """The head that a tensor belongs to, of those that peft keeps in full for the task; '' for others."""
        parts = self._in_memory(name).split(".") if self.task in HEADS else []
        modules = (".".join(parts[:i]) for i in range(1, len(parts)))
        return next((module for module in modules if module.endswith(HEADS[str(self.task)])), "")

    # --- factors ---

    def _target(self, module: str, key: Key) -> Target:
        if holds_experts(key):
            count, *matrix = key.shape
            flip = bool(self._modules.experts_turned(key))
            outputs, inputs = reversed(matrix) if flip else matrix
            update: Update = Experts("", "", (0, inputs), (outputs, 0), count)
            parameter = self.called(key.name).rpartition(".")[2]
            return Target(key, Module(self._wrapped[key.name], update, 1.0, parameter), flip)
        name = self.called(key.name).removesuffix(".weight")
        kind = self.shell.kind(name) if self.shell is not None else ""
        embedding = kind == "embedding" if kind else is_embedding(key)
        flip = embedding or self._flipped(module, key, kind)
        if kind == "other":
            self.parameters.add(name)
        outputs, inputs = reversed(key.shape) if flip else key.shape
        a, b = (stored_name(name, part, embedding) for part in "AB")
        return Target(key, Module(name, Product(a, b, (0, inputs), (outputs, 0), table=embedding), 1.0), flip)

    def _fused_modules(self) -> dict[str, str]:
        """Parameter of fused experts -> the wrapper that peft keeps its factors under: the first is the innermost."""
        roots: dict[str, list[tuple[int, str]]] = {}
        for key in self._chosen.low.values():
            if holds_experts(key):
                root, _, leaf = self.called(key.name).rpartition(".")
                roots.setdefault(root, []).append((ORDER.index(leaf), key.name))
        found = {}
        for root, own in roots.items():
            for depth, (_, name) in enumerate(sorted(own, reverse=True)):
                found[name] = root + ".base_layer" * depth
        return found

    def _flipped(self, module: str, key: Key, kind: str) -> bool:
        """Whether a linear layer stores its weight [in, out]: by its class, else as the biases of its kind say."""
        if self._given is not None:
            return self._given
        if kind in ("linear", "conv1d", "other"):
            return kind == "conv1d"
        known = self._biased.get(kind_of(key.name)) or self._modules.flipped(module)
        if known is None:
            raise PlanError([
                f"nothing tells whether {key.name} is stored [out, in] or [in, out]: put the base's config.json (with "
                "its model_type) beside its weights, or pass fan_in_fan_out"
            ])  # fmt: skip
        return known

    def _orientation_of_biases(self) -> dict[tuple[str, str], bool]:
        """Kind of layer -> whether it is stored [in, out]: a bias is as long as there are outputs."""
        found: dict[tuple[str, str], bool] = {}
        for key in self._origin.keys.values():
            bias = self._origin.keys.get(f"{key.name.removesuffix('.weight')}.bias")
            matrix = bias is not None and len(key.shape) == 2 and key.shape[0] != key.shape[1]
            if matrix and bias is not None and bias.shape in (key.shape[:1], key.shape[1:]):
                found.setdefault(kind_of(key.name), bias.shape == key.shape[1:])
        return found

    # --- what the output layer shares ---

    def _tie(self) -> None:
        """Change a tied output layer along with the embedding: peft unties what it wraps.

        Its factors are those of the embedding, transposed.  `ensure_weight_tying` would do that for some names only.
        """
        head, shared = self._head, self._shared_embedding()
        if head is None or f"{head}.weight" in self.whole:
            return
        tuned = self._tuned.keys
        bias = tuned.get(bias_twin(self._origin, f"{head}.bias") or f"{head}.bias")
        learnt = bias is not None and self.whole.pop(self.called(bias.name), None) is not None
        if shared is None and not learnt:
            return
        at = next((i for i, target in enumerate(self.low) if target.key == shared), None)
        weight = shared or next(key for key in tables(self._tuned) if len(key.shape) == 2)
        if shares(self.config):
            raise PlanError([
                f"{weight.name} changed and is shared by several layers, which an adapter would untie; leave it out "
                f"with --exclude {weight.name}"
            ])  # fmt: skip
        if at is None:  # what is kept in full has all that its module has
            self.whole |= {f"{head}.weight": weight, **({} if bias is None else {f"{head}.bias": bias})}
            return
        outputs, inputs = weight.shape
        a, b = (stored_name(head, part) for part in "AB")
        self.low[at] = replace(self.low[at], twin=Module(head, Product(a, b, (0, inputs), (outputs, 0)), 1.0))
        if bias is not None and learnt:
            self.whole[f"{head}.base_layer.bias"] = bias

    @cached_property
    def _head(self) -> str | None:
        """The output layer in memory that shares the embedding's weight."""
        alias = next((alias for alias in self._origin.aliases if role_of(alias) == "head"), None)
        if alias is None and not self._modules.ties:
            return None
        return self._modules.output_layer or self._modules.in_memory(str(alias)).rpartition(".")[0]

    def _shared_embedding(self) -> Key | None:
        """The changed embedding of tokens: the one that is called so, else the one with a row for each."""
        scopes = [self.config, *(value for value in self.config.values() if isinstance(value, dict))]
        sizes = {scope["vocab_size"] for scope in scopes if isinstance(scope.get("vocab_size"), int)}
        whole = [key for keys in self._chosen.saved.values() for key in keys if key.role == "embed"]
        every = [key for key in (*whole, *(t.key for t in self.low if t.module.embedding)) if len(key.shape) == 2]
        sizes = sizes or {key.rows for key in every}
        tokens = [key for key in every if {key.rows, self._origin.key(key.name).rows} & sizes]
        return max(tokens, key=lambda key: (is_embedding(key), key.rows), default=None)
