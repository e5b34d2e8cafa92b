"""LoRA adapters by themselves: what they add to the weights of each module, read without a base.

Kinds of files: a PEFT folder (adapter_config.json beside adapter_model.safetensors or .bin), and the single files of
diffusers, kohya and LyCORIS (`io.read.lora_files`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith.core.errors import NumericError, SourceError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.io.read import svfit
from weightsmith.io.read.adapter import (
    CONFIG,
    ambiguous,
    of_module,
    open_weights,
    rank_of,
    read_config,
    scale_of,
)
from weightsmith.io.read.lycoris import PARTS, lycoris_update
from weightsmith.io.read.small import short
from weightsmith.io.read.source import Source
from weightsmith.io.read.updates import Experts, Product, Update
from weightsmith.ops.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "NOT_SAVED", "ORDER", "PREFIX", "Adapter", "Module", "TokenRows", "not_saved", "parameter_name", "read_peft",
]  # fmt: skip

PREFIX = "base_model.model."

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta|(?<!token_adapter\.)trainable_tokens_delta"
    rf"|{'|'.join((*PARTS, *svfit.PARTS))})"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<leaf>\.weight|\.bias)?"
)
_KINDS = {
    "lora_A": "A",
    "lora_B": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
    "trainable_tokens_delta": "rows",
}
ORDER = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias")
"""The order in which modules of fused experts declare their parameters: peft wraps the first innermost."""


@dataclass(frozen=True)
class Module:
    """What an adapter does to the weight of one module: adds scale * update.

    parameter  the tensor of the module that it belongs to, where that is not `weight`
    magnitude  DoRA's length of each output unit, or with `inward` of each input
    bias       what is added, times the scale, to the module's bias
    """

    name: str
    update: Update
    scale: float
    parameter: str = "weight"
    magnitude: str | None = None
    inward: bool = False
    bias: str | None = None
    bias_scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.update.rank

    @property
    def groups(self) -> int:
        """Of a convolution: what peft calls its rank is that of all groups together."""
        return self.update.groups if isinstance(self.update, Product) else 1

    @property
    def embedding(self) -> bool:
        """Whether A and B belong to an embedding, whose weight is stored [inputs, outputs]."""
        return isinstance(self.update, Product) and self.update.table

    @property
    def form(self) -> tuple[Any, ...]:
        """What two adapters of one module have in common: all but the rank."""
        update = self.update
        return self.embedding, update.shape, self.parameter, self.groups


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that were trained by themselves; the stored tensor holds them whole, one per index."""

    stored: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter's files.

    kind     'peft', 'diffusers' or 'kohya' (which LyCORIS shares): how its names are meant
    modules  name -> Module, in the file's order
    whole    base tensor's name -> stored name, for tensors kept in full (modules_to_save, trained biases)
    rows     module -> rows of its weight that are replaced
    shifts   (module, 'weight' or 'bias') -> what is added to it as it is
    says     what its user should know
    """

    label: str
    path: Path
    file: Source
    config: Mapping[str, Any]
    modules: Mapping[str, Module]
    whole: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, TokenRows] = field(default_factory=dict)
    shifts: Mapping[tuple[str, str], str] = field(default_factory=dict)
    kind: str = "peft"
    says: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of a module, as peft counts it."""
        return max((module.rank * module.groups for module in self.modules.values()), default=0)

    @property
    def dtypes(self) -> set[str]:
        return {self.file.key(name).dtype for module in self.modules.values() for name in module.update.stored}

    def factors(self, name: str) -> list[Factors]:
        """B [outputs, r] and A [r, inputs] of a module in float32, without its scale; kernels are flattened.

        Fused experts and groups of a convolution have a pair each.
        """
        found = self.modules[name].update.pieces(self.file)
        if not all(bool(torch.isfinite(a).all() & torch.isfinite(b).all()) for b, a in found):
            raise NumericError(f"{self.label}: {name!r} holds NaN or Inf; this adapter is damaged, leave it out")
        return found

    def tensor(self, name: str) -> Tensor:
        """A tensor that is kept in full, as stored."""
        return self.file.read(self.whole[name])

    def fingerprint(self) -> dict[str, Any]:
        return {
            **self.file.fingerprint(),
            "config": xxhash.xxh3_64_hexdigest(json.dumps(self.config, sort_keys=True).encode()),
        }


def read_peft(folder: Path, file: Source | None = None, label: str = "") -> Adapter:
    """The adapter in a PEFT folder; `file`, `label`: its tensors and name, where it is a copy of what lies elsewhere.

    Errors: SourceError for other kinds of adapters, and for whatever in the files does not fit together.
    """
    label = label or str(folder)
    config = read_config(folder)
    file = file or open_weights(folder)
    parts, whole = _sorted(file, label)
    rows = {name: _rows(config, name, own["rows"], file, label) for name, own in parts.items() if "rows" in own}
    parts = {name: own for name, own in parts.items() if "rows" not in own}
    fused = _fused(config, parts, label)
    modules = {name: _module(config, file, label, name, own, fused.get(name, "")) for name, own in parts.items()}
    ranks = {parameter_name(name, module.parameter): module.rank for name, module in modules.items()}
    says = [*ambiguous(config, ranks), *(f"{NOT_SAVED.format(name)} {_UNLESS}" for name in not_saved(config, whole))]
    return Adapter(label, folder, file, config, modules, whole, rows, says=tuple(says))


NOT_SAVED = "modules_to_save names {!r}, but the file holds no tensor of it:"
_UNLESS = "peft cannot load the adapter on a base with such a module, and what was trained of it is not in the result"
_EITHER = {"classifier", "score"}
"""Peft lists both for a classifier, of which one kind of model has one."""


def not_saved(config: Mapping[str, Any], whole: Iterable[str]) -> list[str]:
    """The modules that an adapter says it keeps in full, of which its file has no tensor."""
    named = config.get("modules_to_save") or ()
    modules = [name.rpartition(".")[0] for name in whole]
    found = {str(name) for name in named if any(module.endswith(str(name)) for module in modules)}
    done = found | (_EITHER if found & _EITHER else set())
    return [str(name) for name in named if str(name) not in done]


def parameter_name(module: str, parameter: str) -> str:
    """What peft's patterns call a module, or the parameter of one: without the names of its wrappers."""
    root = _plain(module)
    return root if parameter == "weight" else f"{root}.{parameter}"


def _sorted(file: Source, label: str) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Module -> part ('A', 'B', 'magnitude', 'bias', 'rows', LyCORIS' own) -> stored name; and what is kept whole."""
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for stored in (*file.keys, *file.aliases):
        name = stored.removeprefix(PREFIX)
        found = _PART.fullmatch(name)
        if found is not None:
            part = "bias" if found["leaf"] == ".bias" else _KINDS.get(found["part"], found["part"])
            own = parts.setdefault(found["module"], {})
            if part in own:
                raise SourceError(f"{label}: {stored!r} is stored twice, differently (two adapters in one file?)")
            own[part] = stored
        elif (target := _whole_name(name)) is not None:
            twin = whole.setdefault(target, stored)
            # With bias="all" peft stores the bias of a saved module twice, plain and under its wrapper's name.
            if not np.array_equal(file.bits(twin), file.bits(stored)):
                raise SourceError(f"{label}: {stored!r} is stored twice, differently (two adapters in one file?)")
    return parts, whole


def _whole_name(name: str) -> str | None:
    """The base name of a tensor stored whole, or None for the untrained copy that peft keeps beside a trained one."""
    if ".original_module." in name:
        return None
    # As saved the wrapper's name is gone; a raw state dict has `.modules_to_save.<adapter>.` in it.
    name = re.sub(r"\.modules_to_save\.(?:[^.]+\.(?=.))?", ".", name)
    return _plain(name)


def _plain(name: str) -> str:
    """A name without peft's wrappers of wrapped modules."""
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name)


def _fused(config: Mapping[str, Any], modules: Iterable[str], label: str) -> dict[str, str]:
    """Module -> the parameter that it adapts, for those of `target_parameters`.

    peft wraps a module once for each of its parameters, in the order in which the module declares them, the first
    innermost; where only one is adapted its wrapper is the only one.
    """
    targets = [str(target).rpartition(".")[::2] for target in config.get("target_parameters") or ()]
    wrappers: dict[str, list[str]] = {}
    for name in modules:
        wrappers.setdefault(_plain(name), []).append(name)
    found: dict[str, str] = {}
    for root, names in wrappers.items():
        wanted = {leaf for parent, leaf in targets if leaf != "weight" and _is_parent(parent, root)}
        if not wanted:
            continue
        strange = sorted(wanted - {*ORDER})
        if len(wanted) != len(names) or (strange and len(wanted) > 1):
            raise SourceError(
                f"{label}: {root!r} has {len(names)} adapted parameters, target_parameters in {CONFIG} names "
                f"{', '.join(sorted(wanted))}: which is which cannot be told"
            )
        order = sorted(wanted, key=lambda leaf: ORDER.index(leaf) if leaf in ORDER else 0)
        found |= dict(zip(sorted(names, key=len, reverse=True), order, strict=True))
    return found


def _is_parent(parent: str, module: str) -> bool:
    """Whether parameters of `module` may be meant by a target of that parent; without one, by fused experts only."""
    return f".{module}".endswith(f".{parent}") if parent else "experts" in module.split(".")[-2:]


def _rows(config: Mapping[str, Any], module: str, stored: str, file: Source, label: str) -> TokenRows:
    """The tokens whose rows a stored tensor holds."""
    given = config.get("trainable_token_indices") or config.get("token_indices") or ()
    if isinstance(given, Mapping):
        given = next((own for name, own in given.items() if f".{module}".endswith(f".{name}")), ())
    count = file.key(stored).shape[0] if file.key(stored).shape else 0
    if not isinstance(given, list) or len(given) != count or not all(type(i) is int and i >= 0 for i in given):
        raise SourceError(f"{label}: {stored!r} has {count} rows, {CONFIG} names {short(given)} as their tokens")
    return TokenRows(stored, tuple(given))


def _module(
    config: Mapping[str, Any], file: Source, label: str, name: str, parts: Mapping[str, str], fused: str
) -> Module:
    """Check that a module's parts are all there and fit each other and the configuration."""
    if config["peft_type"] == "SVFIT":
        return Module(name, svfit.singular(config, file, label, name, parts), 1.0)
    if config["peft_type"] in ("LOHA", "LOKR"):
        update, rank, full = lycoris_update(parts, file, f"{label}: {name!r}")
        rank = rank_of(config, name, rank, label) if not full else config.get("r", 8)
        return Module(name, update, scale_of(config, name, rank))
    wanted = {"A", "B"} | ({"magnitude"} if config.get("use_dora") else set())
    for part in ("A", "B", "magnitude"):
        if (part in wanted) != (part in parts):
            state = "lacks" if part in wanted else "has"
            said = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}[part]
            raise SourceError(
                f"{label}: {name!r} {state} a {said}, with use_dora = {bool(config.get('use_dora'))} in {CONFIG}"
            )
    a, b = (file.key(parts[part]) for part in "AB")
    good = len(a.shape) >= 2 and len(b.shape) >= 2 and a.floating and b.floating
    if not good or any(extent != 1 for extent in b.shape[2:]):
        raise SourceError(f"{label}: {name!r} has factors of shapes {list(a.shape)} and {list(b.shape)}")
    if fused:
        return _experts(config, label, name, a, b, fused)
    update = Product(a.name, b.name, a.shape, b.shape, table="lora_embedding_A" in a.name)
    grouped = len(a.shape) > 2 and b.shape[1] and not a.shape[0] % b.shape[1]
    if a.shape[0] != b.shape[1] and not grouped:
        raise SourceError(f"{label}: {name!r} has rank {a.shape[0]} in A and {b.shape[1]} in B")
    called = _called(config, name)
    rank = rank_of(config, called, a.shape[0], label)
    scale = scale_of(config, called, rank)
    return Module(name, update, scale, magnitude=parts.get("magnitude"), bias=parts.get("bias"), bias_scale=scale)


def _called(config: Mapping[str, Any], name: str) -> str:
    """What the patterns for ranks and alphas are matched against: modules whose weight is targeted have it named."""
    targets = [str(target).rpartition(".")[::2] for target in config.get("target_parameters") or ()]
    root = _plain(name)
    named = any(leaf == "weight" and parent and _is_parent(parent, root) for parent, leaf in targets)
    return f"{root}.weight" if named else name


def _experts(config: Mapping[str, Any], label: str, name: str, a: Key, b: Key, parameter: str) -> Module:
    """LoRA of one parameter of fused experts; their number follows from the rank."""
    called = parameter_name(name, parameter)
    said = of_module(config.get("rank_pattern"), called, config.get("r", 8))
    if a.shape[0] != b.shape[1] or a.shape[0] % said:
        raise SourceError(
            f"{label}: {name!r} has {a.shape[0]} rows in A and {b.shape[1]} columns in B for experts of rank {said}"
        )
    update: Update = Experts(a.name, b.name, a.shape, b.shape, a.shape[0] // said)
    if parameter.endswith("_bias"):  # [experts, outputs], which peft takes for one matrix
        update = Product(a.name, b.name, a.shape, b.shape)
    return Module(name, update, scale_of(config, called, said), parameter)
