"""From a recipe to a system, untrained or as a run has left it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from weightsmith.core.errors import OutputError, RecipeError, SourceError
from weightsmith.io.read.open import open_source
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import read_json
from weightsmith.io.read.source import Source, tensor_to_bits
from weightsmith.observe.model import LoadedModel, load_model, pick_device
from weightsmith.observe.names import Naming
from weightsmith.train.multitask.body import Body
from weightsmith.train.multitask.clip import PromptedClip
from weightsmith.train.multitask.conditioned import PLANES, ConditionedInputs, widen
from weightsmith.train.multitask.data import Task, Tasks
from weightsmith.train.multitask.experts import Experts
from weightsmith.train.multitask.net import Net
from weightsmith.train.multitask.plain import SharedHeads
from weightsmith.train.multitask.prompt import SoftPrompt, layers_of
from weightsmith.train.multitask.recipe import MultiTaskRecipe, Prompt
from weightsmith.train.multitask.soft_tokens import SoftTokenModel
from weightsmith.train.multitask.system import System
from weightsmith.train.multitask.text import TextToText
from weightsmith.train.multitask.uni_perceiver import Likelihood

__all__ = ["INFO", "OWN", "build", "digest", "open_body", "read_info", "restore"]

INFO, OWN = "multitask.json", "multitask.safetensors"
"""Beside the model: what was trained, and the mechanism's own tensors."""

_LIMIT = 1 << 26
_TEXT = ("causal-lm", "seq2seq-lm")


def open_body(
    recipe: MultiTaskRecipe, tasks: Tasks, *, at: str | Path | nn.Module | None = None, device: str = "auto"
) -> Body:
    """The shared model: the recipe's, a module from Python, or `at` a result or a merge (folder or file)."""
    if isinstance(at, nn.Module):
        return Body(
            load_model(at, kind="image-encoder") if not hasattr(at, "config") else load_model(at), recipe.length
        )
    if recipe.net is None:
        place = at or recipe.model
        if place is None:
            raise RecipeError("the recipe names neither model nor net")
        return Body(load_model(place, device=device), recipe.length)
    maps = [task.classes for task in tasks.values() if task.kind == "map"]
    net = Net.seeded(recipe.seed, recipe.net.width, recipe.net.depth, out=maps[0] if maps else 3)
    if recipe.by.conditioned is not None:
        widen(net, "enter", PLANES)
    if at is not None:
        source = open_source(str(at))
        _load(net, {name: source.read(name) for name in source.keys}, str(at))
    net.to(pick_device(device))
    return Body(LoadedModel(net, "module", f"net of {recipe.net.depth} blocks", Naming(net)), recipe.length)


def build(recipe: MultiTaskRecipe, body: Body, tasks: Tasks, *, learn: bool = True) -> System:
    """The untrained system; its new weights follow the recipe's seed.  RecipeError for what does not go together."""
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.seed)
        system = _built(recipe, body, tasks, learn)
    own: Any = system.own
    own.to(body.device)
    return system


def _built(recipe: MultiTaskRecipe, body: Body, tasks: Tasks, learn: bool) -> System:
    by, writes = recipe.by, body.loaded.kind in _TEXT
    if recipe.packing and not (writes and (by.plain or by.instruct)):
        raise RecipeError("packing: is for language models with by: plain or instruct; leave it out")
    if by.uni_perceiver is not None:
        return Likelihood(body, tasks, by.uni_perceiver)
    if by.instruct is not None and not writes:
        raise RecipeError(f"by: instruct needs a language model, {body.loaded.label} is for {body.loaded.kind}")
    if by.instruct is not None:
        return TextToText(body, tasks, by.instruct.mode, by.instruct.examples, recipe.answer, packing=recipe.packing)
    if by.prompt is not None:
        return _prompted(recipe, by.prompt, body, tasks)
    if by.task_expert is not None:
        others = [
            Body(load_model(one, device=str(body.device)), recipe.length) for one in by.task_expert.init_experts_from
        ]
        return Experts(body, tasks, by.task_expert, others)
    if by.conditioned is not None:
        return ConditionedInputs(body, tasks, by.conditioned)
    if by.soft_tokens is not None:
        return SoftTokenModel(body, tasks, by.soft_tokens, seed=recipe.seed, learn=learn)
    assert by.plain is not None
    if writes:
        return TextToText(body, tasks, "none", 0, recipe.answer, packing=recipe.packing)
    return SharedHeads(body, tasks, by.plain)


def _prompted(recipe: MultiTaskRecipe, given: Prompt, body: Body, tasks: Tasks) -> System:
    kind = body.loaded.kind
    if kind in _TEXT:
        if given.kind != "text":
            raise RecipeError(f"prompt.kind is {given.kind}, but {body.loaded.label} reads texts only; use text")
        width = body.module.get_input_embeddings().weight.shape[1]
        deep = len(layers_of(body.module)) - 1 if given.deep else 0
        prompt = SoftPrompt("text", given.n_ctx, text=width, deep=deep, seed=recipe.seed)
        system: System = TextToText(body, tasks, "none", 0, recipe.answer, prompt)
    elif kind == "image-text" and hasattr(getattr(body.module, "vision_model", None), "encoder"):
        text, vision = body.module.config.text_config, body.module.config.vision_config
        sizes = {"text": text.hidden_size, "visual": vision.hidden_size, "patch": vision.patch_size}
        count = (text if given.kind == "text" else vision).num_hidden_layers
        prompt = SoftPrompt(given.kind, given.n_ctx, **sizes, deep=count - 1 if given.deep else 0, seed=recipe.seed)
        system = PromptedClip(body, tasks, prompt, given.position)
    else:
        raise RecipeError(f"by: prompt needs a language model or CLIP, {body.loaded.label} is for {kind}")
    if given.init is not None:
        _adapted(prompt, Path(given.init), given, body)
    return system


def _adapted(prompt: SoftPrompt, place: Path, given: Prompt, body: Body) -> None:
    """Start from the prompt of an earlier run, on the same base."""
    info = read_info(place)
    if info["base"] != digest(body.module):
        raise RecipeError(f"{place}: a prompt of another base than {body.loaded.label}; train one on this base")
    said = info["recipe"]["by"].get("prompt") or {}
    for key in ("kind", "n_ctx", "position", "deep"):
        if said.get(key, False) != getattr(given, key):
            raise RecipeError(f"{place}: a prompt with {key} {said.get(key, False)!r}, not {getattr(given, key)!r}")
    source = SafetensorsSource(place / OWN)
    _load(prompt, {name.removeprefix("prompt."): source.read(name) for name in source.keys}, str(place))


def digest(module: nn.Module) -> str:
    """A hash of a module's parameters."""
    found = xxhash.xxh3_128()
    for name, p in module.named_parameters():
        found.update(name.encode())
        found.update(tensor_to_bits(p.detach().cpu()).tobytes())
    return found.hexdigest()


# --- results ------------------------------------------------------------------------------------------


def read_info(folder: Path) -> Mapping[str, Any]:
    """What a result says of itself; SourceError where there is none."""
    path = folder / INFO
    if not path.is_file():
        raise SourceError(f"{folder}: not a result of train multitask (no {INFO})")
    info = read_json(path, _LIMIT)
    if not isinstance(info, dict) or not {"recipe", "base", "trains_base"} <= set(info):
        raise SourceError(f"{path}: not written by train multitask")
    return info


def restore(folder: Path, tasks: Mapping[str, Task], *, at: str | Path | None = None, device: str = "auto") -> System:
    """A trained system; `at`: another shared model of the same shapes (a merge) with this result's own parts.

    Where only own parts trained (a prompt), `at` may be others of the same names, such as a merge of them.

    Errors: OutputError where a base that stayed as it was has changed since.
    """
    info, parts = read_info(folder), folder / OWN
    own: Source | None = SafetensorsSource(parts) if parts.is_file() else None
    if at is not None and own is not None and not info["trains_base"]:
        other = open_source(str(at))
        if set(other.keys) == set(own.keys):
            own, parts, at = other, Path(at), None
    recipe = MultiTaskRecipe.model_validate(info["recipe"])
    body = open_body(recipe, tasks, at=at or (folder if info["trains_base"] else None), device=device)
    system = build(recipe, body, body.prepared(tasks), learn=False)
    if at is None and not info["trains_base"] and digest(body.module) != info["base"]:
        raise OutputError(f"{folder}: its base {recipe.model} has changed since; put back the one it was trained on")
    if own is not None:
        held: Any = system.own
        _load(held, {name: own.read(name) for name in own.keys}, str(parts))
    return system.eval()


def _load(module: nn.Module, tensors: Mapping[str, Tensor], label: str) -> None:
    """Copy tensors into a module; SourceError where names or shapes are not its own."""
    wanted = module.state_dict()
    for name in {**wanted, **tensors}:
        if name not in wanted or name not in tensors:
            raise SourceError(f"{label}: tensor {name!r} is {'unknown' if name in tensors else 'missing'}")
        if wanted[name].shape != tensors[name].shape:
            raise SourceError(
                f"{label}: {name} has shape {tuple(tensors[name].shape)}, wanted {tuple(wanted[name].shape)}"
            )
    module.load_state_dict(dict(tensors))
