"""Whether a model still computes what it did: outputs before and after, on random inputs, by running both.

A batch with padding whose last tokens are read with a cache, one sequence of it at the last positions of the model;
of models that do not generate a batch with padding.  The model is loaded once: the weights that change take the place
of its own.  Figures are largest differences, relative to the largest output, or to 1 where that is smaller.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import SourceError
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.observe.kinds import KINDS
from weightsmith.observe.model import LoadedModel, load_model

__all__ = ["TOLERANCES", "Agreement", "agreement", "difference", "outputs"]

TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
"""Largest difference of outputs by the dtype of the changed tensors; models run in float32."""

_TOKENS = 24
_GENERATED = 9  # tokens of a model that generates, of which the last one comes with a cache
_PADDING = 3
_BLOCK = 1 << 18  # entries that are read at once: they stay in the cache until they have their place


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

    @property
    def words(self) -> str:
        """The figures as part of a sentence about outputs."""
        before = "not tried" if self.before is None else f"{self.before:.2g}"
        return f"moved by {self.after:.2g} of the largest (limit {self.tolerance:g}; before the cast: {before})"

    @property
    def plain(self) -> dict[str, float | None]:
        """As manifests hold it."""
        return {"before_cast": self.before, "after_cast": self.after, "tolerance": self.tolerance}

    @classmethod
    def read(cls, noted: Mapping[str, Any]) -> Agreement:
        """What `plain` gave."""
        return cls(noted["before_cast"], noted["after_cast"], noted["tolerance"])


def agreement(source: Source, view: Source, folder: Path, names: Collection[str]) -> Agreement:
    """Run a model as it was, as a view calculates it, and as a folder holds it; names: the tensors that are changed."""
    tolerance = max(TOLERANCES[key.dtype] for key in view.keys.values() if key.dtype in TOLERANCES)
    loaded = _loaded(source.origin.folder, str(source))
    expected = outputs(loaded)
    before = difference(expected, outputs(loaded)) if _took(loaded, view, names) else None
    made = open_source(folder)
    if before is None or _shapes(made) != _shapes(source) or not _took(loaded, made, names):
        del loaded
        loaded = _loaded(folder, str(folder))
    return Agreement(before, difference(expected, outputs(loaded)), tolerance)


def _shapes(source: Source) -> list[tuple[str, tuple[int, ...], str]]:
    return sorted((key.name, key.shape, key.dtype) for key in source.keys.values())


def outputs(loaded: LoadedModel) -> list[Tensor]:
    """What a model gives for random inputs, always the same ones; float32, padding left out."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if KINDS[loaded.kind].reads != "text":
            return [_tensor(loaded.run(_pixels(loaded, draw)))]
        generates = loaded.kind == "causal-lm"
        length = max(2, loaded.clip_length(_GENERATED if generates else _TOKENS))
        vocabulary = int(loaded.text_config.vocab_size)
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, (2, length), generator=draw)
        if generates:
            return list(_decoded(loaded, ids))
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, length - length // 3 :] = False
        found = _tensor(loaded.run(ids, mask))
        return [found[mask] if found.ndim == 3 and found.shape[:2] == mask.shape else found]


def _pixels(loaded: LoadedModel, draw: torch.Generator) -> Tensor:
    config = getattr(loaded.config, "vision_config", loaded.config)
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    return torch.randn((2, getattr(config, "num_channels", 3), size, size), generator=draw)


def _tensor(out: Any) -> Tensor:
    logits = getattr(out, "logits", None)
    found = out if isinstance(out, Tensor) else out[0] if logits is None else logits
    return found.float()


def _decoded(loaded: LoadedModel, ids: Tensor) -> Iterator[Tensor]:
    """Logits of two sequences: one from the first position on, one padded in front, as far out as there are positions.

    The last token comes by itself, with what the model keeps of those before.
    """
    module: Any = loaded.module
    length = ids.shape[1]
    padding = min(_PADDING, length - 2)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    last = getattr(loaded.text_config, "max_position_embeddings", None)
    far = last - length if isinstance(last, int) and last > 2 * length else -padding
    places = (torch.arange(length) + torch.tensor([[0], [far]])).clamp(min=0)
    takes = "position_ids" in inspect.signature(module.forward).parameters
    kept: dict[str, Any] = {}
    for low, high in ((0, length - 1), (length - 1, length)):
        where = {"position_ids": places[:, low:high]} if takes else {}
        out = module(input_ids=ids[:, low:high], attention_mask=mask[:, :high], use_cache=True, **where, **kept)
        yield _tensor(out)[mask[:, low:high].bool()]
        kept = {"past_key_values": getattr(out, "past_key_values", None)}
        if kept["past_key_values"] is None:
            return


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest difference, relative to the largest expected output or to 1; inf for one that is no number."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if not bool(torch.isfinite(b).all()):
            return float("inf")
        worst = max(worst, float((a - b).abs().max()) / max(1.0, float(a.abs().max())))
    return worst


def _took(loaded: LoadedModel, view: Source, names: Iterable[str]) -> bool:
    """Give a model some tensors of a view, as they are calculated or stored, in place of its own.

    False where its parameters are not those of the view one by one: then it is of no use any more.
    """
    changed, packed = set(names), packed_like_memory(view)
    with torch.no_grad():
        for name, parameter in chain(loaded.module.named_parameters(), loaded.module.named_buffers()):
            stored = loaded.names.name(name) if isinstance(parameter, nn.Parameter) else None
            stored = stored if stored in changed else name if name in changed else None
            if stored is not None and packed.key(stored).shape == tuple(parameter.shape):
                _fill(parameter, packed, stored)
                changed.discard(stored)
    return not changed


def _fill(parameter: Tensor, source: Source, name: str) -> None:
    key = source.key(name)
    if not parameter.ndim:
        parameter.copy_(source.read(name))
        return
    rows = max(1, _BLOCK // max(1, key.numel // max(1, key.rows)))
    for low in range(0, key.rows, rows):
        high = min(key.rows, low + rows)
        parameter[low:high].copy_(source.read(name, low, high))


def _loaded(folder: Path | None, label: str) -> LoadedModel:
    """A model of a folder, for `outputs`; SourceError for what has none."""
    if folder is None:
        raise SourceError(f"{label}: no folder with a config.json, so the model cannot be run before and after")
    return load_model(folder, device="cpu")
