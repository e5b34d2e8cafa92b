"""Fine-tuning in the tangent space: what trains, and the folder that says so (arXiv:2305.12827)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import NumericError, PlanError
from weightsmith.io.package.companions import copy_companions
from weightsmith.io.package.tangent import Tangent, point_of
from weightsmith.io.read.adapter import CONFIG
from weightsmith.io.read.lora import PREFIX
from weightsmith.observe.tangent import Linearized, linearize
from weightsmith.train.save import save_folder

__all__ = ["linearized", "save_linear"]


def linearized(loaded: Any, modules: str | None, rank: int | None, seed: int, example: Tensor) -> Any:
    """A loaded model's tangent model, in its place.

    modules  a regular expression that whole names of parameters' modules match; None: all
    example  one input, to try forward-mode differentiation with
    Raises PlanError where nothing would train or be saved, SourceError for what cannot be linearised.
    """
    source = loaded.names.source
    if source is None:
        raise PlanError(
            [f"{loaded.label}: a linearised model is saved for the files that it starts from; give a folder"]
        )
    names = [name for name, _ in loaded.module.named_parameters()]
    owners = {name: name.rpartition(".")[0] for name in names}
    chosen = {n for n in names if modules is None or re.fullmatch(modules, owners[n])}
    if rank is not None:  # of matrices of layers, not of embeddings, as adapters are
        chosen = {n for n in chosen if _of_layer(loaded.module.get_submodule(owners[n]), n)}
    if not chosen:
        raise PlanError([f"modules: {modules!r} matches no module of {loaded.label}; one is {owners[names[-1]]!r}"])
    made = linearize(loaded.module, only=chosen.__contains__, rank=rank, seed=seed)
    found = replace(loaded, module=made)
    made.refuse_unsupported_run(lambda: found.logits(example[None]))
    return found


def _of_layer(module: torch.nn.Module, name: str) -> bool:
    return name.endswith(".weight") and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")


def save_linear(
    loaded: Any, out: Path, asked: Mapping[str, Any], texts: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write theta as a model folder, its moved tensors in float32, or as a LoRA adapter; marked as linearised."""
    module: Linearized = loaded.module
    base = loaded.names.source
    notes = Tangent(point_of(base), str(loaded.folder or loaded.label)).plain()
    if any(not bool(torch.isfinite(p).all()) for p in module.theta.values()):
        raise NumericError("a trained value is no finite number; lower the learning rate")
    if module.down:
        tensors, config = _adapter(module)
        save_folder(
            out, tensors, made=asked, how="trained in the tangent space", kind="adapter", name="adapter_model",
            texts={CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n", **texts}, notes=notes,
            overwrite=overwrite,
        )  # fmt: skip
        return
    origin = dict(module.origin.named_parameters())
    moved = {name: (origin[name].to(d) + d).detach().cpu() for name, d in module.delta.items()}
    found, _ = loaded.names.convert(moved)
    tensors = {name: found[name] if name in found else base.read(name) for name in base.keys}

    def package(folder: Path) -> None:
        copy_companions(loaded.folder, folder, base.origin.files)

    save_folder(
        out, tensors, made=asked, how="trained in the tangent space", kind="training", overwrite=overwrite,
        texts=texts, package=package, notes=notes,
    )  # fmt: skip


def _adapter(module: Linearized) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration in the form of PEFT's LoRA, whose scale alpha / r is 1."""
    tensors: dict[str, Tensor] = {}
    names, flipped = [], set()
    for name, delta in module.factors.items():
        layer = name.rpartition(".")[0]
        transposed = type(module.origin.get_submodule(layer)).__name__ == "Conv1D"  # its weight is [in, out]
        up, down = (delta[1].T, delta[0].T) if transposed else delta
        flipped.add(transposed)
        names.append(layer)
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = down.detach().cpu().contiguous()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = up.detach().cpu().contiguous()
    rank = len(next(iter(module.down.values())))
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(names), "bias": "none",
        "fan_in_fan_out": flipped == {True},
        "base_model_name_or_path": getattr(module.config, "_name_or_path", None) or None,
    }  # fmt: skip
    return tensors, config
