"""What a model calls its modules in memory and in files, which of them store weights [in, out], and its output layer.

Adapters use the names in memory.  transformers renames while it loads, so that those are not always the names in the
files.  For the families in `RENAMED` the rules stand here; for all others they are asked of transformers, where it is
installed, with an empty shell of the model that config.json describes (nothing is downloaded, no code of the model's
own runs).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.shell import Shell, shell_of
from weightsmith.io.read.small import parse_json
from weightsmith.io.read.source import Source

__all__ = ["CONV1D", "RENAMED", "Modules"]

Rules = Sequence[tuple[str, str]]

_LANGUAGE: Rules = (
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^language_model\.model\b", "model.language_model"),
    (r"^(vision_tower|multi_modal_projector|image_newline)\b", r"model.\1"),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
_QWEN_VL: Rules = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)
_VIT: Rules = (
    (r"\bencoder\.layer\.", "layers."),
    (r"\battention\.attention\.query\b", "attention.q_proj"),
    (r"\battention\.attention\.key\b", "attention.k_proj"),
    (r"\battention\.attention\.value\b", "attention.v_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
RENAMED: Mapping[str, Rules] = {
    **dict.fromkeys(
        ("aya_vision", "gemma3", "llava", "llava_next", "llava_onevision", "mistral3", "paligemma", "vipllava"),
        _LANGUAGE,
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN_VL),
    **dict.fromkeys(("deit", "vit"), _VIT),
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    "mixtral": ((r"\.block_sparse_moe\.", ".mlp."),),
    # What most language models are: nothing is renamed.
    **dict.fromkeys(
        ("bert", "bloom", "distilbert", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gptj", "llama", "mistral",
         "opt", "phi", "phi3", "qwen2", "qwen3", "roberta", "starcoder2", "t5", "xlm-roberta"), ()
    ),
}  # fmt: skip
"""model_type -> how transformers renames on loading: (pattern, replacement), one after the other."""

_HEADS_IN_FILES = {
    **{kind: {"lm_head": "language_model.lm_head"} for kind, rules in RENAMED.items() if rules is _LANGUAGE},
    "gpt_neox": {"lm_head": "embed_out"},
}

CONV1D = frozenset(("clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"))
"""The model types of transformers with layers that store their weights [in, out] (its class Conv1D)."""
_CONV1D_NAMES = frozenset(("c_attn", "c_fc", "c_proj", "q_attn"))
"""What they call those layers."""
_LINEAR = frozenset(("gpt_bigcode", "gpt_neo", "idefics", "qwen", "starcoder2"))
"""The model types that give these names to ordinary linear layers."""
_FLIPPED_EXPERTS = frozenset(("gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe"))
"""The model types whose files hold fused experts [experts, in, out]."""

_HEADS = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel", "ForConditionalGeneration")
_MASKED = {
    "bert": "cls.predictions.decoder", "roberta": "lm_head.decoder", "xlm-roberta": "lm_head.decoder",
    "camembert": "lm_head.decoder", "distilbert": "vocab_projector", "electra": "generator_lm_head",
    "albert": "predictions.decoder", "modernbert": "decoder",
}  # fmt: skip


class Modules:
    """The modules of a model, as its config.json and its tensors' names tell of them."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._names = (*source.keys, *source.aliases)
        self._here = frozenset(self._names)

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
        shell = self._shell
        return shell.renamed if shell is not None else lambda name: name

    @cached_property
    def _shell(self) -> Shell | None:
        return shell_of(json.dumps(self.config, sort_keys=True)) if self.config else None

    def in_files(self, name: str) -> str:
        """What a tensor that the files lack would be called there, as transformers writes it."""
        kind = str(self.config.get("model_type"))
        for new, old in _HEADS_IN_FILES.get(kind, {}).items() if kind in RENAMED else ():
            name = old + name[len(new) :] if name.startswith(f"{new}.") else name
        return name if kind in RENAMED or self._shell is None else self._shell.saved(name)

    # --- classes ---

    def flipped(self, module: str) -> bool | None:
        """Whether a linear layer stores its weight [in, out]; None where its name alone does not say."""
        if module.rpartition(".")[2] not in _CONV1D_NAMES:
            return False  # no architecture of transformers gives such a layer another name
        types = list(_types(self.config))
        part = [kind for place, kind in types if place in module.split(".")]  # 'decoder' of an encoder-decoder
        found = {kind in CONV1D for kind in part or [kind for _, kind in types] if kind in CONV1D | _LINEAR}
        return found.pop() if len(found) == 1 else None

    @property
    def experts_flipped(self) -> bool | None:
        """Whether fused experts are stored [experts, in, out]; None where nothing tells."""
        kinds = {kind for _, kind in _types(self.config)}
        return bool(kinds & _FLIPPED_EXPERTS) if kinds else None

    # --- the output layer ---

    @cached_property
    def output_layer(self) -> str | None:
        """The module in memory whose weight gives the logits of tokens, if the model's class has one."""
        names = self.config.get("architectures")
        name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
        kind = str(self.config.get("model_type"))
        if not name or name.endswith(_HEADS):
            return "lm_head"
        if name.endswith(("ForMaskedLM", "ForPreTraining")) and kind in _MASKED:
            return _MASKED[kind]
        if kind in RENAMED or self._shell is None:
            return None
        return self._shell.output_layer

    @property
    def ties(self) -> bool:
        """Whether config.json says that the output layer's weight is the embedding's."""
        return self.config.get("tie_word_embeddings") is True


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
