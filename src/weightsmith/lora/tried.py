"""Loading a finished adapter with peft, on a model without weights, and applying one of its modules."""

from __future__ import annotations

import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from weightsmith.core.errors import some
from weightsmith.core.lazy import torch
from weightsmith.io.read.lora import parameter_name
from weightsmith.io.read.lora_files import read_adapter
from weightsmith.io.read.shell import made, quiet
from weightsmith.lora.targets import Target, Targets
from weightsmith.lora.write import Written

__all__ = ["tried"]


def tried(result: Written, targets: Targets) -> tuple[str, list[str]]:
    """What peft made of an adapter, in words, and what is wrong with that."""
    if find_spec("peft") is None:
        return "not tried with peft, which is not installed here", []
    if not targets.config:
        return "not tried with peft: the base has no config.json", []
    model = made(dict(targets.config))
    if model is None:
        return f"not tried with peft: transformers does not know {_class(targets)}", []
    label = f"peft {version('peft')}"
    written = {report.name for report in result.modules}
    low = [target for target in targets.low if target.module.name in written]
    smallest = min(low, key=lambda target: target.key.numel, default=None)
    try:
        import transformers

        with quiet(transformers), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            missing, strange, same = _loaded(result, model, smallest, targets)
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return "", [f"{label} cannot load {result.out}: {said}"]
    if missing or strange:
        names = missing or strange
        state = "does not find" if missing else "has no place for"
        return "", [f"{label} {state} {some(names, 1)} of {result.out}"]
    if smallest is not None and not same:
        return "", [f"{label} makes another change of {smallest.key.name} than the one that is stored"]
    applied = "" if smallest is None else f", and changes {smallest.key.name} as it should"
    return f"tried: {label} loads it{applied}", []


def _class(targets: Targets) -> str:
    names = targets.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(targets.config.get("model_type"))


def _loaded(result: Written, model: Any, target: Target | None, targets: Targets) -> tuple[list[str], list[str], bool]:
    """(keys that peft lacks, keys that it does not know, whether one module's change is the one in the file)."""
    import peft

    root = ""
    if target is not None:
        root = parameter_name(target.module.name, "weight")
        model.get_submodule(root).to_empty(device="cpu")  # real, so that its factors stay
    config = peft.PeftConfig.from_pretrained(result.out)
    kind = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, peft.PeftModel)
    wrapped = kind(model, config, low_cpu_mem_usage=True)
    found = wrapped.load_adapter(result.out, "default", low_cpu_mem_usage=True)
    missing = [key for key in found.missing_keys if "lora_" in key or "modules_to_save" in key]
    if target is None or missing or found.unexpected_keys:
        return missing, list(found.unexpected_keys), True
    layer = wrapped.base_model.model.get_submodule(target.module.name)
    delta = layer.get_delta_weight("default").detach().float()
    adapter = read_adapter(result.out)
    module = adapter.modules[target.module.name]
    want = torch.stack([b @ a * module.scale for b, a in adapter.factors(target.module.name)])
    want = want.mT if target.flip else want
    want = want.reshape(target.key.shape)
    return [], [], delta.shape == want.shape and torch.allclose(delta, want, rtol=1e-3, atol=1e-3 * _largest(want))


def _largest(value: Any) -> float:
    return float(value.abs().max())
