"""What was learned of LoRA adapters, as a recipe of `weightsmith lora merge`: an adapter again, no full model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weightsmith.core.lazy import is_a
from weightsmith.inputs.opened import Inputs
from weightsmith.io.disk import replace_file
from weightsmith.io.package.card import yaml_text
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.table import write_table

__all__ = ["ADAPTER", "write_adapter"]

ADAPTER = ("adapter.yaml", "adapter.safetensors")
"""The recipe and its numbers."""


def write_adapter(
    recipe: Mapping[str, Any], coefficients: Mapping[str, Mapping[str, Tensor]], inputs: Inputs, folder: Path
) -> str:
    """Write FOLDER/adapter.yaml where the models are adapters and one can hold the result; returns what is to be said.

    That is a weighted sum of adapters whose changes are products of two factors, one learned number for each module:
    they are concatenated (`cat`), so the rank is the sum of theirs.
    """
    adapters: Mapping[str, Any] = {name: getattr(source, "adapter", None) for name, source in inputs.experts.items()}
    if not all(is_a(source, "io.read.peft", "AdapterSource") for source in inputs.experts.values()):
        return ""
    parsed = Recipe.model_validate({**recipe, "parameters": {}})
    plain = [stage.name for stage in parsed.method] in (["task_arithmetic"], ["scale", "task_arithmetic"])
    fixed = {name: value for stage in parsed.method for name, value in stage.parameters.items()}
    names = ("weight", "lambda", "factor")
    if not plain or set(coefficients) - set(names) or set(fixed) - set(names) or parsed.rules:
        return "no adapter is written: the recipe is more than a weighted sum"
    own = any(ref.parameters for ref in parsed.models.values()) or set(recipe.get("parameters", {})) - set(coefficients)
    if own or any(not isinstance(value, (int, float)) for value in fixed.values()):
        return "no adapter is written: the recipe has numbers of its own beside the learned ones"
    if odd := [n for n, a in adapters.items() if a.whole or a.rows or any(m.magnitude is not None or m.bias is not None
                                                                          for m in a.modules.values())]:  # fmt: skip
        return f"no adapter is written: {odd[0]} changes more than products of two factors"
    values: dict[str, Tensor] = {}
    for module in dict.fromkeys(module for adapter in adapters.values() for module in adapter.modules):
        found = [by_tensor.get(f"{module}.weight") for by_tensor in coefficients.values()]
        if any(one is None or (one.ndim > 1 and one.shape[1] > 1) for one in found):
            return f"no adapter is written: {module} has not one learned number for each model"
        made: Any = 1.0
        for one in found:
            made = made * (one.flatten() if one is not None else 1.0)
        for value in fixed.values():
            made = made * value
        assert isinstance(made, Tensor)
        values[f"{module}.weight"] = made.expand(len(adapters)).contiguous()
    models = {name: str(adapter.path.absolute()) for name, adapter in adapters.items()}
    write_table(folder / ADAPTER[1], tuple(adapters), {"weight": values})
    tree = {"models": models, "method": {"name": "cat"}, "coefficients": ADAPTER[1]}
    replace_file(folder / ADAPTER[0], yaml_text(tree).encode())  # last: all is there
    return f'as an adapter: "weightsmith lora merge {folder / ADAPTER[0]} OUT"'
