"""Values of config.json that should agree between the models of a merge: the result has the first one's.

Where they differ the models compute their outputs in unlike ways, whatever their weights.  An activation or the size of
a head changes what a weight means: such models are refused.  Everything else is said, with both values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.core.problem import Code, Problem
from weightsmith.inputs.opened import Inputs
from weightsmith.io.architectures import TIED
from weightsmith.io.read.headed import labels_of
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.small import read_json
from weightsmith.io.read.source import Source

__all__ = ["unlike_configs"]

Config = Mapping[str, Any]
_LIMIT = 16_000_000  # bytes of config.json

_ACTIVATIONS = (
    *("hidden_act", "hidden_activation", "activation_function", "activation", "act_fn", "dense_act_fn"),
    *("feed_forward_proj", "projector_hidden_act"),
)
_ALIKE = ({"silu", "swish"}, {"gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"}, {"gelu", "gelu_python"})
"""Names of one function."""
_SAID = re.compile(
    r"(?:rms_norm|layer_norm|layernorm|norm)_(?:eps|epsilon)|num_attention_heads|n_head|num_key_value_heads"
    rf"|sliding_window|use_sliding_window|{TIED}|\w+_token_(?:id|index)"
    r"|(?:attn|final)_logit_softcapping|query_pre_attn_scalar|scale_embedding|logit_scale|\w+_multiplier"
    r"|num_experts_per_tok|norm_topk_prob|routed_scaling_factor|scoring_func|architectures|model_type"
    r"|layer_types|no_rope_layers|vision_feature_layer|position_embedding_type|use_qk_norm|attn_temperature_tuning"
    r"|rope_local_base_freq|rotary_(?:pct|emb_base|dim)|relative_attention_max_distance|logits_scaling|n_group"
    r"|topk_(?:group|method)|use_parallel_residual|parallel_attn|alibi|scale_attn_by_inverse_layer_idx"
    r"|vision_feature_select_strategy|fullatt_block_indexes|window_size|mm_tokens_per_image"
)
_OF_TEXTS = re.compile(r"(?:bos|eos|pad|sep|cls|unk|mask|decoder_start|forced_\w+)_token_id")
"""What the tokenizer's files say too; `inputs.vocabulary` compares those."""
_LEFT = ("quantization_config", "compression_config", "id2label", "label2id")
_ROPE = ("rope_parameters", "rope_scaling")
_DEFAULTS: Config = {
    "rope_theta": 10000.0, "rope_scaling": {"rope_type": "default"}, "partial_rotary_factor": 1.0,
    "use_sliding_window": False, "routed_scaling_factor": 1.0, "position_embedding_type": "absolute",
    "scale_embedding": False,
}  # fmt: skip
"""What classes take where nothing is said: no line where the other model says just that."""
_DERIVED = re.compile(
    rf"{TIED}|architectures|model_type|head_dim|layer_types|no_rope_layers|rope_parameters|\w+_token_\w+"
    r"|rope_local_base_freq|rotary_\w+|feed_forward_proj"
)
"""What some releases of transformers write, and others leave out or call otherwise, for one and the same model."""
_ITEMS = 4  # of a long list that are shown


def unlike_configs(inputs: Inputs) -> Iterator[tuple[bool, Problem]]:
    """(whether it is refused, the line) for every value that differs from the first model's."""
    if not inputs.models:
        return
    (label, first), *others = inputs.models
    mine = _values(_config(first))
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, source in others:
        theirs = _values(_config(source))
        for field in _said_by_one(mine, theirs):
            pair = ((label, first, mine), (name, source, theirs))
            (who, _, says), (silent, quiet, _) = pair if field in mine else pair[::-1]
            left = "null" if _is_null(_config(quiet), field) else "nothing (its class's default)"
            text = (
                f"config.json: {who} says {field} {_shown(says[field])}, {silent} says {left}; "
                f"the result has that of {label}"
            )
            yield False, Problem(Code.COMPANION, field.rpartition(".")[2], text)
        for field in mine.keys() & theirs.keys():
            if mine[field] != theirs[field]:
                a, b = mine[field], theirs[field]
                found.setdefault((field, _shown(a, b), _shown(b, a)), []).append(name)
    for (field, value, other), names in sorted(found.items()):
        both = f"{field} is {value} in {label}, {other} in {', '.join(names)}"
        leaf = field.rpartition(".")[2]
        if leaf in (*_ACTIVATIONS, "head_dim"):
            text = f"config.json: {both}: their weights mean different things; leave {' and '.join(names)} out"
            yield True, Problem(Code.FIT, leaf, text)
        else:
            yield False, Problem(Code.COMPANION, leaf, f"config.json: {both}; the result has that of {label}")
    yield from _unlike_labels(inputs)
    methods = {name: _quantisation(source) for name, source in inputs.models}
    if len(set(methods.values())) > 1:
        each = ", ".join(f"{method or 'none'} in {name}" for name, method in methods.items())
        text = f"config.json: quantization is {each}; what is merged are the weights, and the result is not quantised"
        yield False, Problem(Code.COMPANION, "quantization_config", text)


def _unlike_labels(inputs: Inputs) -> Iterator[tuple[bool, Problem]]:
    """Labels that the models number otherwise: the rows of their heads stand for other classes."""
    named = {name: found for name, source in inputs.models if (found := labels_of(_config(source)))}
    (label, mine), *others = named.items() or [("", [])]
    for name, theirs in others:
        if len(theirs) == len(mine) and [n.lower() for n in theirs] != [n.lower() for n in mine]:
            text = (
                f"config.json: id2label is {_shown(mine, theirs)} in {label}, {_shown(theirs, mine)} in {name}: the "
                f"rows of their heads stand for unlike labels; the result has those of {label}"
            )
            yield False, Problem(Code.COMPANION, "id2label", text)


def _said_by_one(one: Config, two: Config) -> Iterator[str]:
    """Fields that one of two configurations gives and the other, which has that part too, leaves to its class."""
    parts = [{field.rpartition(".")[0] for field in values} for values in (one, two)]
    for field in sorted(one.keys() ^ two.keys()):
        part, _, leaf = field.rpartition(".")
        values, other = (one, two) if field in one else (two, one)
        place = field.removesuffix(leaf)
        spellings = _ACTIVATIONS if leaf in _ACTIVATIONS else ("rope_parameters",) if leaf.startswith("rope_") else ()
        if part not in parts[0] & parts[1] or _DERIVED.fullmatch(leaf) or values[field] == _DEFAULTS.get(leaf):
            continue
        if leaf == "num_key_value_heads" and values[field] == values.get(f"{place}num_attention_heads"):
            continue
        if {leaf, f"text_config.{leaf}", *(f"{place}{name}" for name in spellings)} & other.keys():
            continue  # it is there, in another layout
        yield field


def _is_null(config: Any, field: str) -> bool:
    """Whether a field, 'text_config.sliding_window', is there and null: that may be another value than the default."""
    for part in field.split("."):
        if not isinstance(config, dict) or part not in config:
            return False
        config = config[part]
    return config is None


def _quantisation(source: Source) -> str:
    """How the files of a model are quantised, as they say; '' where they are not."""
    path = None if source.origin.folder is None else source.origin.folder / "config.json"
    try:
        found = read_json(path, _LIMIT) if path is not None and path.is_file() else {}
    except SourceError:
        return ""  # whoever needs it will say what is wrong with it
    found = found if isinstance(found, dict) else {}
    noted: Config = next((found[name] for name in _LEFT[:2] if isinstance(found.get(name), dict)), {})
    return str(noted.get("quant_method", ""))


def _config(source: Source) -> Config:
    try:
        found = json.loads(config_of(source) or "{}")
    except (ValueError, RecursionError):
        return {}  # whoever needs it will say what is wrong with it
    return found if isinstance(found, dict) else {}


def _values(config: Config, place: str = "") -> dict[str, Any]:
    """'text_config.rope_theta' -> value, for what should agree, in a form that spellings do not change."""
    found: dict[str, Any] = {}
    unused = "sliding_window" if config.get("use_sliding_window") is False else ""  # null in files of later releases
    for field, value in config.items():
        if field == unused:
            continue
        if isinstance(value, dict) and field not in (*_LEFT, *_ROPE):
            found |= _values(value, f"{place}{field}.")
        elif field in _ACTIVATIONS and isinstance(value, str):
            found[place + field] = next((sorted(names)[0] for names in _ALIKE if value in names), value)
        elif value is not None and _SAID.fullmatch(field) and not _OF_TEXTS.fullmatch(field):
            found[place + field] = value
    if (size := _head(config)) is not None:
        found[f"{place}head_dim"] = size
    return found | {place + field: value for field, value in _rope(config).items()}


def _head(config: Config) -> int | None:
    """The size of an attention head."""
    if isinstance(given := config.get("head_dim"), int):
        return given
    width = config.get("hidden_size", config.get("n_embd"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else None


def _rope(config: Config) -> dict[str, Any]:
    """rope_theta and rope_scaling, whether they stand alone (transformers 4) or in `rope_parameters` (5)."""
    inside: Config = next((config[field] for field in _ROPE if isinstance(config.get(field), dict)), {})
    if any(isinstance(value, dict) for value in inside.values()):
        return {"rope_parameters": inside}  # one for each type of layers
    alone = {field: inside.get(field, config.get(field)) for field in ("rope_theta", "partial_rotary_factor")}
    said = {field: float(v) if isinstance(v, int) else v for field, v in alone.items() if v is not None}
    if not said and not inside:
        return {}
    kind = inside.get("rope_type", inside.get("type", "default"))
    rest = {k: v for k, v in inside.items() if k not in (*alone, "rope_type", "type") and v is not None}
    return {**said, "rope_scaling": {"rope_type": kind, **rest}}


def _shown(value: Any, other: Any = None) -> str:
    """A value in few words; of a long list what begins where another list differs."""
    if isinstance(value, list) and len(value) > _ITEMS:
        pairs = zip(value, other if isinstance(other, list) else [], strict=False)
        start = next((i for i, (one, two) in enumerate(pairs) if one != two), 0)
        items = [json.dumps(item) for item in value[start : start + _ITEMS]]
        items = ["..."] * (start > 0) + items + ["..."] * (start + _ITEMS < len(value))
        return f"[{', '.join(items)}] ({len(value)} values)"
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 200 else f"{text[:200]}..."
