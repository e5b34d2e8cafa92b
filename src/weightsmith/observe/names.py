"""What the checkpoint calls the parameters of a running model.

transformers builds some models with other names, and other cuts, than their files have: a ViT's
`query` is `q_proj` in the module, an MoE's experts are one stacked tensor, a bare backbone gets a prefix.
Statistics must carry the files' names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.io.read.source import Source

__all__ = ["Naming"]


class Naming:
    """Translates the parameters' names and shapes into those of `source`; without one they are the module's own."""

    def __init__(self, module: nn.Module, source: Source | None = None) -> None:
        self._module, self._source = module, source
        self._prefix = getattr(module, "base_model_prefix", "") + "."
        self._shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}

    @property
    def source(self) -> Source | None:
        """The checkpoint, if there is one."""
        return self._source

    def name(self, *names: str) -> str | None:
        """The one stored tensor that holds a parameter (known under several names if tied), or None."""
        if self._source is None:
            return names[0]
        for name in names:
            shape = self._shapes[name]
            found = self._revert({name: torch.empty(shape, device="meta")})
            if len(found) == 1 and (stored := self._stored(next(iter(found)), shape)):
                return stored
        return None

    def convert(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Cut and name tensors shaped like the parameters as the checkpoint does; also the names it does not have.

        transformers' conversions only move, cut and join elements, so any statistic per element may go through.
        """
        if self._source is None:
            return dict(tensors), []
        found: dict[str, Tensor] = {}
        lost = []
        for name, tensor in self._revert(dict(tensors)).items():
            stored = self._stored(name, tuple(tensor.shape))
            if stored is None:
                lost.append(name)
            else:
                found[stored] = tensor.contiguous()
        return found, lost

    def _revert(self, tensors: dict[str, Any]) -> dict[str, Any]:
        if not hasattr(self._module, "config"):
            return tensors
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Any] = revert_weight_conversion(self._module, tensors)
        return reverted

    def _stored(self, name: str, shape: tuple[int, ...]) -> str | None:
        """The listed name of a tensor of this shape, with or without the backbone's prefix."""
        assert self._source is not None
        for candidate in self._candidates(name):
            listed = self._source.aliases.get(candidate, candidate)
            if listed in self._source.keys and self._source.keys[listed].shape == shape:
                return listed
        return None

    def _candidates(self, name: str) -> Iterator[str]:
        yield name
        yield name.removeprefix(self._prefix)
        yield self._prefix + name
