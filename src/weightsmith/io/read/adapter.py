"""A PEFT folder's configuration: what is understood of it, and the rank and scale of each module.

Files: adapter_config.json and adapter_model.safetensors (or .bin), as the peft library writes them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError, some
from weightsmith.io.read.pickle import PickleSource
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import read_json, short, word
from weightsmith.io.read.source import Source

__all__ = [
    "CONFIG",
    "FIELDS",
    "HINTS",
    "MLX_WEIGHTS",
    "UNREAD_HINTS",
    "ambiguous",
    "of_module",
    "open_weights",
    "rank_of",
    "read_config",
    "read_raw",
    "scale_of",
    "ties_for_good",
]

CONFIG = "adapter_config.json"
MLX_WEIGHTS = "adapters.safetensors"
"""The weights beside it, where mlx-lm wrote both."""
HINTS = ("lora", "hada_w", "lokr_w", ".diff", "_norm")
"""One of these is in every name that makes a file an adapter: most names of models are told by that at once."""
UNREAD_HINTS = (".oft_", ".on_input", ".ia3_l", ".b2.weight")
"""The same of the kinds of adapter that are not read."""
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

FIELDS: Mapping[str, str] = {
    "LORA": "lora_alpha",
    "LOHA": "alpha",
    "LOKR": "alpha",
    "SVFIT": "",
    "TRAINABLE_TOKENS": "",
}
"""peft_type -> the field that its scale comes from; '' where there is none."""

# What may stand in adapter_config.json without changing what the stored tensors mean.
# fmt: off
_HARMLESS = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "base_weights", "bases", "bias", "corda_config",
        "decompose_both", "decompose_factor", "energy", "eva_config", "exclude_modules", "inference_mode",
        "init_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias", "lora_dropout",
        "lora_ga_config",
        "megatron_config", "megatron_core", "module_dropout", "modules_to_save", "parametrize", "peft_type",
        "peft_version", "qalora_group_size", "rank_dropout", "rank_dropout_scale", "revision", "runtime_config",
        "squares", "svfit_dropout", "target_modules", "task_type", "use_effective_conv2d",
    )
)
_USED = frozenset(
    (
        "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out",
        "init_lora_weights", "ensure_weight_tying", "target_parameters", "trainable_token_indices", "token_indices",
    )
)
# fmt: on
_LIMIT = 10_000_000  # bytes of adapter_config.json; real ones have up to a few hundred thousand
_MOST_PATTERNS = 10_000
_REPEAT = re.compile(r"\)?[*+{]")
_TIED = ("embed_tokens", "lm_head")
_BASE_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


def read_raw(folder: Path) -> dict[str, Any]:
    """adapter_config.json, whoever wrote it."""
    path = folder / CONFIG
    config = read_json(path, _LIMIT)
    if not isinstance(config, dict):
        raise SourceError(f"{path}: not a JSON object")
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """What peft wrote, where all of it is understood."""
    path, config = folder / CONFIG, read_raw(folder)
    kind = str(config.get("peft_type"))
    if kind not in FIELDS:
        known = "LORA (with rsLoRA and DoRA), LOHA, LOKR, SVFIT and TRAINABLE_TOKENS"
        raise SourceError(f"{path}: peft_type {short(config.get('peft_type'))} is not supported, only {known}")
    for field, value in config.items():
        if value and field not in _HARMLESS | _USED:
            said = f"{word(field)} = {short(value)}"
            raise SourceError(f"{path}: {said} is not supported; merge this adapter with peft first")
    init = config.get("init_lora_weights")
    if init not in _BASE_UNCHANGED:
        raise SourceError(
            f"{path}: init_lora_weights = {short(init)} changed the base's weights in training; save the adapter with "
            "path_initial_model_for_weight_conversion, or merge it with peft first"
        )
    _positive(config, "r", 8, path)
    _positive(config, FIELDS[kind] or "r", 8, path)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise SourceError(f"{path}: {field} is {short(patterns)}, not a mapping from module patterns to numbers")
        if len(patterns) > _MOST_PATTERNS:
            raise SourceError(f"{path}: {field} has {len(patterns)} patterns; at most {_MOST_PATTERNS} are tried")
        for pattern in patterns:
            _positive(patterns, pattern, None, path)
            _check_pattern(pattern, f"{path}: {field} {short(pattern)}")
    return config


def _positive(values: Mapping[str, Any], field: str, default: Any, path: Path) -> None:
    value = values.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise SourceError(f"{path}: {word(field)} = {short(value)} is not a positive number below 1e30")


def _check_pattern(pattern: str, label: str) -> None:
    """Refuse what is no regular expression, and what could be matched for hours: repeats within or behind repeats."""
    repeats = _REPEAT.findall(pattern)
    if len(pattern) > 500 or len(repeats) > 4 or any(repeat.startswith(")") for repeat in repeats):
        raise SourceError(f"{label} is too involved to be matched; at most 4 repeats (* + {{}}), none of a group")
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise SourceError(f"{label} is not a regular expression ({error})") from None


@lru_cache(maxsize=2 * _MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern[str]:
    """How peft matches a pattern: against the whole module name, or its last components."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of sets that a later Python may read otherwise
        return re.compile(rf"(.*\.)?({pattern})$")


def of_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches a module's name."""
    return next((value for pattern, value in (patterns or {}).items() if _compiled(pattern).match(module)), default)


def rank_of(config: Mapping[str, Any], module: str, found: int, label: str) -> int:
    """The rank of a module, which its tensors have (`found`) and its configuration must allow."""
    said = of_module(config.get("rank_pattern"), module, config.get("r", 8))
    if found != said and found not in _matching(config, "rank_pattern", module).values():
        raise SourceError(f"{label}: {module!r} has rank {found} in its tensors, but {CONFIG} says {said}")
    return found


def ambiguous(config: Mapping[str, Any], ranks: Mapping[str, int]) -> Iterator[str]:
    """A line for every pair of patterns that match one module with different values; ranks: module -> rank.

    peft takes the first that matches, and sorts the patterns when it saves them: training may have taken another.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for module, rank in ranks.items():
        for field in ("alpha_pattern", "rank_pattern"):
            matching = _matching(config, field, module)
            first = next(iter(matching), "")
            second = next((p for p, value in matching.items() if value != matching[first]), None)
            if second is None:
                continue
            one, two = (
                scale_of({**config, field: {p: matching[p]}}, module, rank if field == "alpha_pattern" else matching[p])
                for p in (first, second)
            )
            text = f"{field} {first!r} (scale {one:g}) and {second!r} (scale {two:g})"
            found.setdefault((text, first), []).append(module)
    for (text, first), modules in found.items():
        yield (
            f"{some(modules, 1)}: matched by {text}; {first!r} counts, the first in the file, as when peft loads it; "
            "training may have taken the other"
        )


def ties_for_good(config: Mapping[str, Any]) -> bool:
    """Whether what is trained at a tied embedding is trained at the output layer too, though it is stored once.

    peft 0.21.2 does what `ensure_weight_tying` asks for only where one of two names is listed, so not for GPT-2's wte;
    where it does, its own files hold both.
    """
    if not config.get("ensure_weight_tying") or "target_modules" not in config:
        return bool(config.get("ensure_weight_tying"))
    lists = [config.get(field) for field in ("target_modules", "modules_to_save")]
    named = [str(name) for one in lists if isinstance(one, list) for name in one]
    return any(name.rpartition(".")[2] in _TIED for name in named)


def _matching(config: Mapping[str, Any], field: str, module: str) -> dict[str, Any]:
    return {p: value for p, value in (config.get(field) or {}).items() if _compiled(p).match(module)}


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of a module, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732)."""
    alpha = of_module(config.get("alpha_pattern"), module, config.get(FIELDS[config.get("peft_type", "LORA")], 8))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def open_weights(folder: Path) -> Source:
    for name in _WEIGHTS:
        if (folder / name).exists():
            path = folder / name
            return PickleSource(path) if path.suffix == ".bin" else SafetensorsSource(path)
    raise SourceError(f"{folder}: has {CONFIG} but neither {' nor '.join(_WEIGHTS)}")
