"""What the files of an adapter call things: the stored names of factors, and adapter_config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from weightsmith.core.keys import Key
from weightsmith.io.read.lora import PREFIX, Module, parameter_name
from weightsmith.io.read.updates import Experts

__all__ = ["TARGETING", "config_of", "keys_of", "stored_name"]

_TAKEN = ("auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "fan_in_fan_out", "revision",
          "task_type")  # fmt: skip
TARGETING = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")


def stored_name(module: str, part: str, embedding: bool = False) -> str:
    """Under which name peft looks for a module's 'A' or 'B'."""
    return f"{PREFIX}{module}.lora_embedding_{part}" if embedding else f"{PREFIX}{module}.lora_{part}.weight"


def keys_of(
    module: str, b: tuple[int, ...], a: tuple[int, ...], dtype: str, *, embedding: bool = False, kind: str = "peft"
) -> tuple[Key, Key]:
    """The stored tensors B and A of a module; `kind` as in `Adapter`."""
    if kind == "peft":
        names = [stored_name(module, part, embedding) for part in "BA"]
    else:
        parts = ("lora_up", "lora_down") if kind == "kohya" else ("lora_B", "lora_A")
        names = [f"{module}.{part}.weight" for part in parts]
    return Key(names[0], b, dtype), Key(names[1], a, dtype)


def config_of(
    ranks: Mapping[str, int],
    like: Mapping[str, Any],
    *,
    modules: Mapping[str, Module] | None = None,
    targets: Any = None,
    saved: Iterable[str] = (),
    scale: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The adapter_config.json of an adapter with these modules.

    ranks    module -> rank; r is the largest, the others go to rank_pattern
    like     fields to take over from another configuration (task type, base, bias, orientation)
    modules  what is known of them, where some adapt parameters that are no module's `weight`
    targets  target_modules; default: the modules' full names, which match nothing else
    saved    modules_to_save
    scale    module -> alpha / r; 1 where it is not given
    """
    r = max(ranks.values(), default=1)
    alphas = {name: rank * (scale or {}).get(name, 1.0) for name, rank in ranks.items()}
    usual = next((alphas[name] for name, rank in ranks.items() if rank == r), float(r))
    taken = _TAKEN if targets is None else (*_TAKEN, *TARGETING)
    known = modules or {}
    called = {name: parameter_name(name, known[name].parameter) if name in known else name for name in ranks}
    fused = [name for name in ranks if name in known and isinstance(known[name].update, Experts)]
    plain = sorted(called[name] for name in ranks if name not in fused)
    chosen = {"target_modules": plain or None, "target_parameters": sorted(called[n] for n in fused) or None}
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "task_type": None,
        **(chosen if fused and targets is None else {"target_modules": plain if targets is None else targets}),
        **{field: like[field] for field in taken if field in like},
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(saved) or None,
        "r": r,
        "lora_alpha": _plain(usual),
        "rank_pattern": {_exactly(called[n]): rank for n, rank in ranks.items() if rank != r},
        "alpha_pattern": {_exactly(called[n]): _plain(alpha) for n, alpha in alphas.items() if alpha != usual},
        "use_dora": False,
        "use_rslora": False,
    }


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _exactly(name: str) -> str:
    """A pattern that peft matches against this module alone."""
    return "^" + name.replace(".", r"\.")
