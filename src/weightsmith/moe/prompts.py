"""Prompts to token numbers, and to the states that they leave in the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import layer_of
from weightsmith.moe.recipe import Prompt
from weightsmith.observe.model import LoadedModel, TextCoder

__all__ = ["encoded", "states"]

Ids = tuple[int, ...]


def encoded(prompts: Sequence[Prompt], coder: TextCoder | None, vocabulary: int, label: str) -> list[Ids]:
    """Token numbers of every prompt, in an order of their own; texts begin with BOS where the model has one."""
    made = []
    for prompt in prompts:
        if isinstance(prompt, str):
            assert coder is not None
            ids = (*coder.prefix, *coder.encode(prompt))
        else:
            ids = prompt
        if not ids or max(ids) >= vocabulary:
            raise SourceError(
                f"{label}: prompt {str(prompt)[:60]!r} has tokens {ids[:8]} of a vocabulary of {vocabulary}"
            )
        made.append(tuple(ids))
    return sorted(made)


def states(loaded: LoadedModel, prompts: Sequence[Ids], *, whole: bool, site: str) -> Tensor:
    """What prompts leave in each layer, averaged over them: [layers, hidden] float64.

    whole  the mean over a prompt's tokens instead of its last token
    site   'residual': what enters the layer; 'mlp_input': what its MLP, and so the router, will see (after the norm)
    Prompts are run one at a time: there is no padding to leave out.
    """
    total: Tensor | None = None
    for ids in prompts:
        entering = torch.stack(_run(loaded, ids, site)).double()  # [layers, tokens, hidden]
        one = entering.mean(1) if whole else entering[:, -1]
        total = one if total is None else total + one
    assert total is not None
    return total / len(prompts)


def _run(loaded: LoadedModel, ids: Ids, site: str) -> list[Tensor]:
    """One forward pass; a [tokens, hidden] per layer."""
    module: Any = loaded.module
    tokens = torch.tensor([ids], device=loaded.device)
    if site == "residual":
        with torch.inference_mode():
            found = module(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
        return [state[0].cpu() for state in found[:-1]]
    seen: dict[int, Tensor] = {}

    def note(layer: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        seen[layer] = args[0][0].cpu()

    handles = [mlp.register_forward_pre_hook(partial(note, layer)) for layer, mlp in _mlps(loaded.module)]
    try:
        with torch.inference_mode():
            module(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[layer] for layer in sorted(seen)]


def _mlps(module: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    for name, part in module.named_modules():
        place = layer_of(f"{name}.weight")
        if place is not None and name == f"{place[0]}.{place[1]}.mlp":
            yield place[1], part
