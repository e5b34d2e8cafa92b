"""Adapters that mlx-lm trained: adapters.safetensors beside an adapter_config.json of its own.

A module has lora_a [inputs, r] and lora_b [r, outputs], an embedding of tokens lora_a [tokens, r] and lora_b
[r, width]; what is added is scale * lora_a lora_b, transposed for a linear layer.  `scale` is the factor itself, not an
alpha.  DoRA's `m` is a length of each row of the weight.  As of mlx-lm 0.32.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import role_of
from weightsmith.io.read.adapter import CONFIG, MLX_WEIGHTS, read_raw
from weightsmith.io.read.lora import Adapter, Module, read_peft
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import short, word
from weightsmith.io.read.source import Source
from weightsmith.io.read.updates import Product

__all__ = ["is_mlx", "read_folder"]

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
_KINDS = ("lora", "dora")


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is mlx-lm's."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def read_folder(folder: Path, file: Source | None = None, label: str = "") -> Adapter:
    """The adapter in a folder with an adapter_config.json, peft's or mlx-lm's; see `lora.read_peft`."""
    config = read_raw(folder)
    if not is_mlx(config):
        return read_peft(folder, file, label)
    label = label or str(folder)
    scale = _scale(config, folder / CONFIG)
    if file is None:
        if not (folder / MLX_WEIGHTS).is_file():
            raise SourceError(f"{folder}: has the {CONFIG} of mlx-lm but no {MLX_WEIGHTS}")
        file = SafetensorsSource(folder / MLX_WEIGHTS)
    modules = {name: _module(name, own, file, scale, label) for name, own in _parts(file, label).items()}
    # A tied embedding gives the logits too, in mlx-lm with what was added to it.
    said = {"peft_type": "LORA", "base_model_name_or_path": config.get("model"), "task_type": "CAUSAL_LM",
            "ensure_weight_tying": True}  # fmt: skip
    return Adapter(label, folder, file, said, modules, says=_says(config, scale))


def _scale(config: Mapping[str, Any], path: Path) -> float:
    kind = config.get("fine_tune_type", "lora")
    if kind not in _KINDS:
        raise SourceError(
            f"{path}: {word('fine_tune_type')} = {short(kind)} of mlx-lm is not read, only {' and '.join(_KINDS)}; "
            'make a model of it with "mlx_lm.fuse" and give that'
        )
    given = config.get("lora_parameters")
    scale = given.get("scale") if isinstance(given, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < abs(scale) < 1e30:
        raise SourceError(
            f"{path}: lora_parameters.scale is {short(scale)}, not a number; mlx-lm does not load it either"
        )
    return float(scale)


def _says(config: Mapping[str, Any], scale: float) -> tuple[str, ...]:
    given = config["lora_parameters"]
    alpha, rank = given.get("alpha"), given.get("rank")
    if alpha is None or alpha == rank:
        return ()
    return (
        f"lora_parameters has alpha {short(alpha)} beside scale {scale:g}: {scale:g} counts, as in mlx-lm today; "
        "releases of 2024 multiplied it by alpha / rank",
    )


def _parts(file: Source, label: str) -> dict[str, dict[str, str]]:
    """Module -> part ('lora_a', 'lora_b', 'm') -> stored name."""
    parts: dict[str, dict[str, str]] = {}
    for name in (*file.keys, *file.aliases):
        found = _PART.fullmatch(name)
        if found is None:
            raise SourceError(f"{label}: {name!r} is no part of a LoRA as mlx-lm writes it")
        parts.setdefault(found["module"], {})[found["part"]] = name
    return parts


def _module(name: str, parts: Mapping[str, str], file: Source, scale: float, label: str) -> Module:
    if not {"lora_a", "lora_b"} <= parts.keys():
        raise SourceError(f"{label}: {name!r} has {', '.join(sorted(parts))} instead of lora_a and lora_b")
    a, b = (file.key(parts[part]) for part in ("lora_a", "lora_b"))
    if len(a.shape) == len(b.shape) == 3:
        raise SourceError(
            f"{label}: {name!r} adapts all experts of a layer in one tensor, which is not read; make a model of it "
            'with "mlx_lm.fuse" and give that'
        )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0] or not (a.floating and b.floating):
        raise SourceError(f"{label}: {name!r} has factors of shapes {list(a.shape)} and {list(b.shape)}")
    table = role_of(name) == "embed"
    update = Product(a.name, b.name, (a.shape[1], a.shape[0]), (b.shape[1], b.shape[0]), turned=True, table=table)
    return Module(name, update, scale, magnitude=parts.get("m"), inward=table)
