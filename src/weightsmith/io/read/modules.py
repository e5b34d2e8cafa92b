"""What a model calls its modules in memory and in files, which of them store weights [in, out], and its output layer.

Adapters use the names in memory.  transformers renames while it loads, so that those are not always the names in the
files.  The rules of common families stand in `architectures.RENAMED`; for all others they are asked of transformers,
where it is installed, with an empty shell of the model that config.json describes (nothing is downloaded, no code of
the model's own runs).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key
from weightsmith.io.architectures import (
    CAUSAL,
    CONV1D,
    CONV1D_NAMES,
    EITHER_EXPERTS,
    FLIPPED_EXPERTS,
    HEADS_IN_FILES,
    OUTPUT_LAYERS,
    PLAIN_LINEAR,
    RENAMED,
    UNMARKED_EXPERTS,
    Rules,
)
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.shell import Shell, shell_of
from weightsmith.io.read.small import parse_json
from weightsmith.io.read.source import Source
from weightsmith.io.read.untied import says_tied

__all__ = ["Modules"]


class Modules:
    """The modules of a model, as its config.json and its tensors' names tell of them."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._names = (*source.keys, *source.aliases)
        self._here = frozenset(self._names)
        self._keys = source.keys

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json; empty where there is none."""
        try:
            text = config_of(self._source)
            found = parse_json((text or "{}").encode(errors="surrogateescape"), f"{self._source}: config.json")
        except SourceError:
            return {}  # whoever needs it will say what is wrong with it
        return found if isinstance(found, dict) else {}

    # --- names ---

    def stored(self, name: str) -> str | None:
        """The name in the files of the tensor that is called `name` in memory, or in the files; None if there is none.

        A prefix that only one of the two has (`bert.`, `model.`) is no difference.
        """
        if name in self._here:
            return name
        for candidate in (name, self.in_memory(name)):
            if candidate in self._by_memory:
                return self._by_memory[candidate]
        shorter = name.partition(".")[2]
        if shorter in self._here:
            return shorter
        longer = [f"{head}.{name}" for head in self._heads if f"{head}.{name}" in self._here]
        return longer[0] if len(longer) == 1 else None

    @property
    def renames(self) -> bool:
        """Whether names in memory may differ from those in files: config.json says of which model they are."""
        kind = str(self.config.get("model_type"))
        return bool(RENAMED[kind]) if kind in RENAMED else "model_type" in self.config

    def in_memory(self, name: str) -> str:
        """What a tensor is called once transformers has loaded it."""
        return self._renamed(name)

    @cached_property
    def _by_memory(self) -> dict[str, str]:
        return {self._renamed(name): name for name in self._names}

    @cached_property
    def _heads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self._names))

    @cached_property
    def _renamed(self) -> Callable[[str], str]:
        rules = RENAMED.get(str(self.config.get("model_type")))
        if rules is not None:
            return lambda name: _by_rules(rules, name)
        shell = self.shell
        return shell.renamed if shell is not None else lambda name: name

    @cached_property
    def shell(self) -> Shell | None:
        return shell_of(json.dumps(self.config, sort_keys=True)) if self.config else None

    def in_files(self, name: str) -> str:
        """What a tensor that the files lack would be called there, as transformers writes it."""
        kind = str(self.config.get("model_type"))
        for new, old in HEADS_IN_FILES.get(kind, {}).items() if kind in RENAMED else ():
            name = old + name[len(new) :] if name.startswith(f"{new}.") else name
        return name if kind in RENAMED or self.shell is None else self.shell.saved(name)

    # --- classes ---

    def flipped(self, module: str) -> bool | None:
        """Whether a linear layer stores its weight [in, out]; None where its name alone does not say."""
        if module.rpartition(".")[2] not in CONV1D_NAMES:
            return False  # no architecture of transformers gives such a layer another name
        types = list(_types(self.config))
        part = [kind for place, kind in types if place in module.split(".")]  # 'decoder' of an encoder-decoder
        found = {kind in CONV1D for kind in part or [kind for _, kind in types] if kind in CONV1D | PLAIN_LINEAR}
        return found.pop() if len(found) == 1 else None

    def experts_flipped(self, key: Key) -> bool | None:
        """Whether a tensor of fused experts is stored [experts, in, out]; None where nothing tells."""
        kinds = {kind for _, kind in _types(self.config)}
        if kinds & EITHER_EXPERTS:
            width = (self.config.get("text_config") or self.config).get("hidden_size")
            return width is not None and key.shape[-1 if key.name.endswith("gate_up_proj") else -2] != width
        return bool(kinds & FLIPPED_EXPERTS) if kinds else None

    def experts_turned(self, key: Key) -> bool | None:
        """Whether peft's factors belong to the transpose of what is stored; None where nothing tells."""
        unmarked = any(kind in UNMARKED_EXPERTS for _, kind in _types(self.config))
        return False if unmarked else self.experts_flipped(key)

    # --- the output layer ---

    @cached_property
    def output_layer(self) -> str | None:
        """The module in memory whose weight gives the logits of tokens, if the model's class has one."""
        names = self.config.get("architectures")
        name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
        kind = str(self.config.get("model_type"))
        causal = not name or name.endswith(CAUSAL)
        if kind in OUTPUT_LAYERS and (causal or name.endswith(("ForMaskedLM", "ForPreTraining"))):
            return OUTPUT_LAYERS[kind]
        if kind in RENAMED or not name or self.shell is None:
            return "lm_head" if causal else None
        return self.shell.output_layer

    @property
    def ties(self) -> bool:
        """Whether the output layer's weight is the embedding's: config.json says so, and the files have no other."""
        return (
            says_tied(self.config)
            and self.output_layer is not None
            and self.stored(f"{self.output_layer}.weight") not in self._keys
        )


def _by_rules(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = _compiled(pattern).sub(replacement, name, count=1)
    return name


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def _types(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """(field that the part stands under, model_type) of a model and its parts."""
    if isinstance(kind := config.get("model_type"), str):
        yield place, kind
    for field, value in config.items():
        if isinstance(value, dict) and field not in ("quantization_config",):
            yield from _types(value, field)
