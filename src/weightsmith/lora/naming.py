"""What the files of an adapter call things: the stored names of factors, and adapter_config.json."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from weightsmith.core.keys import Key
from weightsmith.io.architectures import TEXT_TO_TEXT
from weightsmith.io.read.lora import PREFIX, Module, parameter_name

__all__ = ["HEADS", "TARGETING", "config_of", "keys_of", "stored_name", "task_of"]

_TAKEN = ("auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "fan_in_fan_out", "revision",
          "task_type")  # fmt: skip
TARGETING = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")


_TASKS = (("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"), ("ForSequenceClassification", "SEQ_CLS"),
          ("ForTokenClassification", "TOKEN_CLS"), ("ForQuestionAnswering", "QUESTION_ANS"))  # fmt: skip


HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task -> endings of the modules that peft keeps in full by itself and will find in the file."""


def task_of(config: Mapping[str, Any]) -> str | None:
    """peft's task type for a model's class; None where none fits: peft then calls the model as it is.

    SEQ_2_SEQ_LM is for models from text to text alone: its wrapper passes `input_ids`, which those that hear or see
    (Whisper) do not take.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if config.get("model_type") in TEXT_TO_TEXT and name.endswith(("ForConditionalGeneration", "MTModel")):
        return "SEQ_2_SEQ_LM"
    return next((task for ending, task in _TASKS if name.endswith(ending)), None)


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
    parameters: Collection[str] = (),
    targets: Any = None,
    saved: Iterable[str] = (),
    scale: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The adapter_config.json of an adapter with these modules.

    ranks    module -> rank; r is the largest, the others go to rank_pattern
    like     fields to take over from another configuration (task type, base, bias, orientation)
    modules  what is known of them, where some adapt parameters that are no module's `weight`
    parameters  modules of other classes than peft adapts, whose weight is then named as a parameter
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
    called |= {name: f"{name}.weight" for name in parameters if name in called}
    fused = [n for n in ranks if n in parameters or (n in known and known[n].parameter != "weight")]
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
