"""What a PEFT folder says: its configuration, and what each stored tensor does to the base.  No arithmetic.

Files: adapter_config.json and adapter_model.safetensors (or .bin), as the peft library writes them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import SourceError, did_you_mean
from weightsmith.core.keys import Key
from weightsmith.io.read.pickle import PickleSource
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import read_json, short, word
from weightsmith.io.read.source import Source

__all__ = ["CONFIG", "Change", "of_module", "open_weights", "plain_name", "read_changes", "read_config", "split_name"]

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?"
)
_KINDS = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
}

# What may stand in adapter_config.json without changing what the stored tensors mean.
# fmt: off
_HARMLESS = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
        "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
        "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
        "task_type",
    )
)
_USED = frozenset(
    (
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out",
        "init_lora_weights",
    )
)
# fmt: on
_LIMIT = 10_000_000  # bytes of adapter_config.json; real ones have up to a few hundred thousand
_MOST_PATTERNS = 10_000
_REPEAT = re.compile(r"\)?[*+{]")
_BASE_UNCHANGED = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Change:
    """What an adapter does to one base tensor; the strings are names in the adapter's file.

    replacement        stands in for the base's tensor (modules_to_save, trained biases)
    a, b, scale, flip  low-rank update: scale * B A, transposed if `flip` (weights stored [in, out])
    magnitude          DoRA's length of each output unit
    bias               added, times scale (lora_bias)
    """

    replacement: str | None = None
    a: str | None = None
    b: str | None = None
    scale: float = 1.0
    flip: bool = False
    magnitude: str | None = None
    bias: str | None = None

    @property
    def computed(self) -> bool:
        return self.a is not None or self.bias is not None


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = read_json(path, _LIMIT)
    if not isinstance(config, dict):
        raise SourceError(f"{path}: not a JSON object")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SourceError(f"{path}: peft_type {short(kind)} is not supported, only LORA (with rsLoRA and DoRA) is")
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
    _positive(config, "lora_alpha", 8, path)
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


def open_weights(folder: Path) -> Source:
    for name in _WEIGHTS:
        if (folder / name).exists():
            path = folder / name
            return PickleSource(path) if path.suffix == ".bin" else SafetensorsSource(path)
    raise SourceError(f"{folder}: has {CONFIG} but neither {' nor '.join(_WEIGHTS)}")


def read_changes(config: Mapping[str, Any], file: Source, base: Source, label: str) -> dict[str, Change]:
    """Base tensor name -> what the adapter does to it.  Every tensor of the adapter is used, or refused."""
    modules: dict[str, dict[str, str]] = {}
    changes: dict[str, Change] = {}
    for stored in (*file.keys, *file.aliases):
        part = split_name(stored)
        if part is None:
            target = plain_name(stored.removeprefix(_PREFIX))
            if target is not None and not _tied_copy(stored, target, file, base):
                key = _target(stored, target, base, label)
                _same_shape(stored, file.key(stored).shape, key, base, label)
                # With bias="all" peft stores the bias of a saved module twice, plain and under its wrapper's name.
                twin = changes.setdefault(target, Change(replacement=stored)).replacement or stored
                _once(not np.array_equal(file.bits(twin), file.bits(stored)), stored, label)
            continue
        module, kind = part
        entry = modules.setdefault(module, {})
        _once(kind in entry, stored, label)
        entry[kind] = stored
    updates = [_low_rank(config, file, base, label, module, parts) for module, parts in modules.items()]
    flips = _orientations(config, updates, label)
    for update in updates:
        _add(changes, config, file, base, label, update, flips[update.module])
    if not changes:
        raise SourceError(f"{label}: the adapter changes none of the {len(base.keys)} tensors of {base.label}")
    return changes


def split_name(stored: str) -> tuple[str, str] | None:
    """(module, 'A', 'B', 'magnitude' or 'bias') of a stored name, or None for a tensor kept in full."""
    part = _PART.fullmatch(stored.removeprefix(_PREFIX))
    if part is None:
        return None
    return part["module"], "bias" if part["leaf"] == ".bias" else _KINDS[part["part"]]


def plain_name(name: str) -> str | None:
    """The base name of a tensor stored whole, or None for the untrained copy that peft keeps beside a trained one."""
    if ".original_module." in name:
        return None
    # As saved the wrapper's name is gone; a raw state dict has `.modules_to_save.<adapter>.` in it.
    name = re.sub(r"\.modules_to_save\.(?:[^.]+\.(?=.))?", ".", name)
    return name.replace(".base_layer.", ".")


def _tied_copy(stored: str, target: str, file: Source, base: Source) -> bool:
    """Whether this is the second copy of a tensor that the base ties, and does not store under this name.

    peft keeps both where a saved embedding is the output layer as well; where they are equal one stands for both.
    """
    if target in base.keys:
        return False
    name_of = {other: plain_name(other.removeprefix(_PREFIX)) for other in file.keys if split_name(other) is None}
    tied_to = base.aliases.get(target)
    twins = [other for other, name in name_of.items() if name in base.keys and tied_to in (None, name)]
    shape = file.key(stored).shape
    return any(file.key(t).shape == shape and np.array_equal(file.bits(t), file.bits(stored)) for t in twins)


def _once(repeated: bool, stored: str, label: str) -> None:
    if repeated:
        raise SourceError(f"{label}: {stored!r} is stored twice, differently (two adapters in one file?)")


def _target(stored: str, target: str, base: Source, label: str) -> Key:
    """The base tensor that an adapter's tensor changes: it must be there, and not tied to another."""
    if target in base.aliases:
        raise SourceError(
            f"{label}: {stored!r} changes {target!r}, which {base.label} ties to {base.aliases[target]!r}; "
            "one cannot change without the other"
        )
    if target not in base.keys:
        hint = did_you_mean(target, base.keys)
        hint = hint if hint.startswith("; did") else ""  # the whole list of a model's tensors helps nobody
        raise SourceError(f"{label}: {stored!r} belongs to {target!r}, which {base.label} lacks{hint}")
    return base.keys[target]


def _same_shape(stored: str, shape: tuple[int, ...], key: Key, base: Source, label: str) -> None:
    if key.shape != shape:
        raise SourceError(
            f"{label}: {stored!r} is {list(shape)}, but {key.name!r} in {base.label} is {list(key.shape)}"
        )


@dataclass(frozen=True)
class _LowRank:
    """The parts of one module's update: names in the adapter's file, and the base weight they belong to."""

    module: str
    parts: Mapping[str, str]
    weight: Key
    rank: int
    inputs: int
    outputs: int

    @property
    def embedding(self) -> bool:
        return "lora_embedding_A" in self.parts["A"]

    @property
    def flips(self) -> tuple[bool, ...]:
        """Orientations that the weight's shape allows: False for [out, in], True for [in, out]."""
        shapes = {False: (self.outputs, self.inputs), True: (self.inputs, self.outputs)}
        return tuple(flip for flip, shape in shapes.items() if shape == self.weight.shape)


def _low_rank(
    config: Mapping[str, Any], file: Source, base: Source, label: str, module: str, parts: Mapping[str, str]
) -> _LowRank:
    """Check that A, B and the other parts of a module are all there and fit each other, the config and the base."""
    some = next(iter(parts.values()))
    wanted = {"A", "B"} | ({"magnitude"} if config.get("use_dora") else set())
    for part in ("A", "B", "magnitude"):
        if (part in wanted) != (part in parts):
            state = "lacks" if part in wanted else "has"
            name = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}[part]
            raise SourceError(
                f"{label}: {module!r} {state} a {name}, with use_dora = {bool(config.get('use_dora'))} in {CONFIG}"
            )
    weight = _target(some, f"{module}.weight", base, label)
    a, b = (file.key(parts[part]).shape for part in "AB")
    if len(weight.shape) != 2 or len(a) != 2 or len(b) != 2:
        raise SourceError(
            f"{label}: {module!r} adapts a weight of shape {list(weight.shape)} (a convolution?), "
            "which is not supported; merge this adapter with peft first"
        )
    if not weight.floating:
        raise SourceError(
            f"{label}: {weight.name!r} in {base.label} is {weight.dtype} (quantised?); give the full model"
        )
    rank = of_module(config.get("rank_pattern"), module, config.get("r", 8))
    if not a[0] == b[1] == rank:
        raise SourceError(f"{label}: {module!r} has rank {a[0]} in A and {b[1]} in B, but {CONFIG} says {rank}")
    found = _LowRank(module, parts, weight, rank, inputs=a[1], outputs=b[0])
    if not found.flips:
        raise SourceError(
            f"{label}: {module!r} adapts a weight of shape {[b[0], a[1]]}, "
            f"but {weight.name!r} in {base.label} is {list(weight.shape)}"
        )
    if "magnitude" in parts and math.prod(file.key(parts["magnitude"]).shape) != found.outputs:
        raise SourceError(
            f"{label}: {parts['magnitude']!r} is {list(file.key(parts['magnitude']).shape)}, "
            f"but {module!r} has {found.outputs} outputs"
        )
    return found


def _orientations(config: Mapping[str, Any], updates: list[_LowRank], label: str) -> dict[str, bool]:
    """Module -> whether its weight is stored [in, out].

    peft decides by layer class and keeps one flag for the last layer it saw.  Classes are not known here:
    the shape decides, and a square weight goes with the others (embeddings are always [in, out]).
    """
    layers = [update for update in updates if not update.embedding]
    seen = {update.flips[0] for update in layers if len(update.flips) == 1}
    usual = seen.pop() if len(seen) == 1 else bool(config.get("fan_in_fan_out"))
    chosen = {update.module: True for update in updates if update.embedding}
    for update in layers:
        if len(update.flips) == 2 and seen:
            raise SourceError(
                f"{label}: {update.weight.name!r} is square, and other layers are stored both ways round; "
                "merge this adapter with peft first"
            )
        chosen[update.module] = update.flips[0] if len(update.flips) == 1 else usual
    for update in updates:
        if update.embedding and True not in update.flips:
            raise SourceError(f"{label}: {update.module!r} is stored transposed, which no embedding is")
    return chosen


def _add(
    changes: dict[str, Change],
    config: Mapping[str, Any],
    file: Source,
    base: Source,
    label: str,
    update: _LowRank,
    flip: bool,
) -> None:
    """Enter one module's update into `changes`, on top of a replacement that may be there."""
    alpha = of_module(config.get("alpha_pattern"), update.module, config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(update.rank) if config.get("use_rslora") else update.rank)
    parts, name = update.parts, update.weight.name
    before = changes.get(name, Change())
    changes[name] = replace(
        before, a=parts["A"], b=parts["B"], scale=scale, flip=flip, magnitude=parts.get("magnitude")
    )
    if "bias" in parts:
        key = _target(parts["bias"], f"{update.module}.bias", base, label)
        _same_shape(parts["bias"], file.key(parts["bias"]).shape, key, base, label)
        changes[key.name] = replace(changes.get(key.name, Change()), bias=parts["bias"], scale=scale)
