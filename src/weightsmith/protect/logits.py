"""Whether a model still computes what it did: outputs before and after, on random inputs, by running both.

A batch with padding, long positions where the model takes them, and decoding with a cache where it generates.
Figures are largest differences, relative to the largest output, or to 1 where that is smaller.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import SourceError
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.source import Source
from weightsmith.observe.kinds import KINDS
from weightsmith.observe.model import LoadedModel, load_model

__all__ = ["TOLERANCES", "Agreement", "before_cast", "difference", "outputs"]

TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
"""Largest difference of outputs by the dtype of the changed tensors; models run in float32."""

_TOKENS = 24
_CACHED = 3  # of them decoded one by one


@dataclass(frozen=True)
class Agreement:
    """How far outputs moved.

    before  with changed weights that are not yet rounded to their dtype; None: not tried
    after   with the weights that were written
    """

    before: float | None
    after: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return all(value <= self.tolerance for value in (self.before, self.after) if value is not None)


def outputs(loaded: LoadedModel) -> list[Tensor]:
    """What a model gives for random inputs, always the same ones; float32, padding left out."""
    draw = torch.Generator().manual_seed(0)
    module: Any = loaded.module
    with torch.no_grad():
        if KINDS[loaded.kind].reads != "text":
            return [_tensor(loaded.run(_pixels(loaded, draw)))]
        length = max(2, loaded.clip_length(_TOKENS))
        vocabulary = int(loaded.text_config.vocab_size)
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, (2, length), generator=draw)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, length - length // 3 :] = False
        found = [_tensor(loaded.run(ids, mask))]
        if found[0].ndim == 3 and found[0].shape[:2] == mask.shape:
            found = [found[0][mask]]
        if loaded.kind == "causal-lm":
            found += [*_far(loaded, module, ids), *_cached(module, ids)]
    return found


def _pixels(loaded: LoadedModel, draw: torch.Generator) -> Tensor:
    config = getattr(loaded.config, "vision_config", loaded.config)
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    return torch.randn((2, getattr(config, "num_channels", 3), size, size), generator=draw)


def _tensor(out: Any) -> Tensor:
    logits = getattr(out, "logits", None)
    found = out if isinstance(out, Tensor) else out[0] if logits is None else logits
    return found.float()


def _far(loaded: LoadedModel, module: Any, ids: Tensor) -> Iterable[Tensor]:
    """At the last positions that the model has, where it takes positions."""
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return
    last = getattr(loaded.text_config, "max_position_embeddings", None)
    if isinstance(last, int) and last > 2 * ids.shape[1]:
        places = torch.arange(last - ids.shape[1], last).expand_as(ids)
        yield _tensor(module(input_ids=ids, position_ids=places, use_cache=False))


def _cached(module: Any, ids: Tensor) -> Iterable[Tensor]:
    """The last tokens one by one, with what the model keeps of those before."""
    known = max(1, ids.shape[1] - _CACHED)
    out = module(input_ids=ids[:1, :known], use_cache=True)
    for place in range(known, ids.shape[1]):
        kept = getattr(out, "past_key_values", None)
        if kept is None:
            return
        out = module(input_ids=ids[:1, place : place + 1], past_key_values=kept, use_cache=True)
        yield _tensor(out)


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest difference, relative to the largest expected output or to 1; inf for one that is no number."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if not bool(torch.isfinite(b).all()):
            return float("inf")
        worst = max(worst, float((a - b).abs().max()) / max(1.0, float(a.abs().max())))
    return worst


def before_cast(loaded: LoadedModel, view: Source, names: Iterable[str], expected: list[Tensor]) -> float | None:
    """How far outputs move with the changed tensors of a view, in float32 and not rounded to their dtype.

    The model is changed.  None where its parameters are not those of the files one by one.
    """
    changed, packed = set(names), packed_like_memory(view)
    with torch.no_grad():
        for name, parameter in chain(loaded.module.named_parameters(), loaded.module.named_buffers()):
            stored = loaded.names.name(name) if isinstance(parameter, nn.Parameter) else None
            stored = stored if stored in changed else name if name in changed else None
            if stored is not None and packed.key(stored).shape == tuple(parameter.shape):
                parameter.copy_(packed.read(stored))
                changed.discard(stored)
    return None if changed else difference(expected, outputs(loaded))


def loadable(folder: Path | None, label: str) -> LoadedModel:
    """A model of a folder, for `outputs`; SourceError for what has none."""
    if folder is None:
        raise SourceError(f"{label}: no folder with a config.json, so the model cannot be run before and after")
    return load_model(folder, device="cpu")
