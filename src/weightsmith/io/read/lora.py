"""LoRA adapters by themselves: the factors of every module, read from a PEFT folder without its base.

Files: adapter_config.json and adapter_model.safetensors (or .bin), as the peft library writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith.core.errors import NumericError, SourceError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.io.read.adapter import CONFIG, of_module, open_weights, plain_name, read_config, split_name
from weightsmith.io.read.remote_source import local_copy
from weightsmith.io.read.source import Source
from weightsmith.io.url import Url, parse_url
from weightsmith.ops.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PREFIX", "TARGETING", "Adapter", "Module", "config_of", "keys_of", "stored_name"]

PREFIX = "base_model.model."
_TAKEN = ("auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "fan_in_fan_out", "revision",
          "task_type")  # fmt: skip
TARGETING = ("layers_to_transform", "layers_pattern", "exclude_modules")


@dataclass(frozen=True)
class Module:
    """One adapted module: delta = scale * B A, transposed where `embedding` (peft stores those so).

    a, b     names in the adapter's file
    a_shape  [r, inputs], or [r, inputs, *kernel] of a convolution
    b_shape  [outputs, r], or [outputs, r, 1, ...]
    """

    name: str
    a: str
    b: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    scale: float

    @property
    def rank(self) -> int:
        return self.a_shape[0]

    @property
    def embedding(self) -> bool:
        return "lora_embedding_A" in self.a

    @property
    def form(self) -> tuple[bool, int, tuple[int, ...], tuple[int, ...]]:
        """What two adapters of one module have in common: all but the rank."""
        return self.embedding, self.b_shape[0], self.a_shape[1:], self.b_shape[2:]


class Adapter:
    """The LoRA adapter in a folder, or at a URL (then the files are copied first: they are small).

    modules  name -> Module, in the file's order
    whole    base tensor's name -> stored name, for tensors kept in full (modules_to_save, trained biases)

    Errors: SourceError for DoRA and lora_bias, which are no products of two factors; for other kinds of adapters;
    and for whatever in the files does not fit together.
    """

    def __init__(self, path: str | Path) -> None:
        url = parse_url(path)
        self.path = local_copy(url) if isinstance(url, Url) else (url or Path(path).expanduser())
        self.label = str(url or path)
        if not (self.path / CONFIG).is_file():
            raise SourceError(f"{path}: no LoRA adapter here (no {CONFIG})")
        self.config = read_config(self.path)
        for field in ("use_dora", "lora_bias"):
            if self.config.get(field):
                raise SourceError(
                    f"{path}: {field} is not a product of two factors, so it cannot be combined exactly; merge this "
                    'adapter into its base with "weightsmith merge" and get a LoRA back with "weightsmith lora extract"'
                )
        self.file: Source = open_weights(self.path)
        self.modules, self.whole = self._read()

    def _read(self) -> tuple[dict[str, Module], dict[str, str]]:
        parts: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for stored in (*self.file.keys, *self.file.aliases):
            found = split_name(stored)
            if found is None:
                target = plain_name(stored.removeprefix(PREFIX))
                if target is not None:
                    twin = whole.setdefault(target, stored)
                    if not np.array_equal(self.file.bits(twin), self.file.bits(stored)):
                        raise SourceError(f"{self.label}: {target!r} is stored twice, differently")
            elif found[1] in parts.setdefault(found[0], {}):
                raise SourceError(f"{self.label}: {stored!r} is stored twice (two adapters in one file?)")
            else:
                parts[found[0]][found[1]] = stored
        if not parts:
            raise SourceError(f"{self.label}: no lora_A and lora_B in it")
        return {name: self._module(name, found) for name, found in parts.items()}, whole

    def _module(self, name: str, parts: Mapping[str, str]) -> Module:
        if set(parts) != {"A", "B"}:
            raise SourceError(f"{self.label}: {name!r} has {' and '.join(sorted(parts))} instead of lora_A and lora_B")
        a, b = (self.file.key(parts[part]) for part in "AB")
        rank = of_module(self.config.get("rank_pattern"), name, self.config.get("r", 8))
        good = len(a.shape) >= 2 and len(b.shape) >= 2 and a.floating and b.floating
        if not good or any(extent != 1 for extent in b.shape[2:]):
            raise SourceError(f"{self.label}: {name!r} has factors of shapes {list(a.shape)} and {list(b.shape)}")
        if not a.shape[0] == b.shape[1] == rank:
            raise SourceError(
                f"{self.label}: {name!r} has rank {a.shape[0]} in A and {b.shape[1]} in B, but {CONFIG} says {rank}"
            )
        alpha = of_module(self.config.get("alpha_pattern"), name, self.config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return Module(name, parts["A"], parts["B"], a.shape, b.shape, float(scale))

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(module.rank for module in self.modules.values())

    @property
    def dtypes(self) -> set[str]:
        return {self.file.key(name).dtype for module in self.modules.values() for name in (module.a, module.b)}

    def factors(self, name: str) -> Factors:
        """B [outputs, r] and A [r, inputs] of a module in float32, without its scale; kernels are flattened."""
        module = self.modules[name]
        a, b = self.file.read(module.a).float(), self.file.read(module.b).float()
        if not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
            raise NumericError(f"{self.label}: {name!r} holds NaN or Inf; this adapter is damaged, leave it out")
        return Factors(b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1))

    def tensor(self, name: str) -> Tensor:
        """A tensor that is kept in full, as stored."""
        return self.file.read(self.whole[name])

    def fingerprint(self) -> dict[str, Any]:
        return {
            **self.file.fingerprint(),
            "config": xxhash.xxh3_64_hexdigest(json.dumps(self.config, sort_keys=True).encode()),
        }


def stored_name(module: str, part: str, embedding: bool = False) -> str:
    """Under which name peft looks for a module's 'A' or 'B'."""
    return f"{PREFIX}{module}.lora_embedding_{part}" if embedding else f"{PREFIX}{module}.lora_{part}.weight"


def config_of(
    ranks: Mapping[str, int],
    like: Mapping[str, Any],
    *,
    targets: Any = None,
    saved: Iterable[str] = (),
    scale: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The adapter_config.json of an adapter with these modules.

    ranks    module -> rank; r is the largest, the others go to rank_pattern
    like     fields to take over from another configuration (task type, base, bias, orientation)
    targets  target_modules; default: the modules' full names, which match nothing else
    saved    modules_to_save
    scale    module -> alpha / r; 1 where it is not given
    """
    r = max(ranks.values(), default=1)
    alphas = {name: rank * (scale or {}).get(name, 1.0) for name, rank in ranks.items()}
    usual = next((alphas[name] for name, rank in ranks.items() if rank == r), float(r))
    taken = _TAKEN if targets is None else (*_TAKEN, *TARGETING)
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "task_type": None,
        **{field: like[field] for field in taken if field in like},
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(saved) or None,
        "r": r,
        "lora_alpha": _plain(usual),
        "rank_pattern": {_exactly(n): rank for n, rank in ranks.items() if rank != r},
        "alpha_pattern": {_exactly(n): _plain(alpha) for n, alpha in alphas.items() if alpha != usual},
        "target_modules": sorted(ranks) if targets is None else targets,
        "use_dora": False,
        "use_rslora": False,
    }


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _exactly(name: str) -> str:
    """A pattern that peft matches against this module alone."""
    return "^" + name.replace(".", r"\.")


def keys_of(module: str, b: tuple[int, ...], a: tuple[int, ...], dtype: str, embedding: bool) -> tuple[Key, Key]:
    """The stored tensors B and A of a module."""
    return Key(stored_name(module, "B", embedding), b, dtype), Key(stored_name(module, "A", embedding), a, dtype)
