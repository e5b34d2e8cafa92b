"""Whether a model still computes what it did: outputs before and after, on random inputs, by running both.

Of a model that generates: a sequence half at the first and half at the last positions there are, beside a padded one,
read at once before and with changed weights, and with the written ones so that the last tokens come with a cache.  Of
others a batch with padding.  All in float32; figures are largest differences, relative to the largest output, or to 1
where that is smaller.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.align.running import Running, running
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.observe.kinds import KINDS
from weightsmith.observe.model import LoadedModel

__all__ = ["TOLERANCES", "Agreement", "agreement", "difference", "outputs"]

TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}
"""Largest difference of outputs by the dtype of the changed tensors; before the cast that of float32 for all."""

_TOKENS = 24
_GENERATED = 8  # tokens of a model that generates, of which the last one comes with a cache
_PADDING = 3


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
        exact = min(self.tolerance, TOLERANCES["float32"])
        return self.after <= self.tolerance and (self.before is None or self.before <= exact)

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
    model = running(source)
    expected = _outputs(model)
    if model.streamed and not bool(torch.isfinite(expected).all()):
        model = running(source, hold=True)
        expected = _outputs(model)
    before = difference(expected, _outputs(model)) if model.take(view, names) else None
    made = open_source(folder)
    if before is None or _shapes(made) != _shapes(source) or not model.take(made, names):
        del model
        model = running(made, hold=True)
    found = _outputs(model, cached=True)
    after = difference(expected, found)
    if after > tolerance:  # some models answer otherwise with a cache, whatever their weights
        del model
        after = difference(_outputs(running(source, hold=True), cached=True), found)
    return Agreement(before, after, tolerance)


def _outputs(model: Running, cached: bool = False) -> Tensor:
    with model.at_work() as loaded:
        return outputs(loaded, cached=cached)


def _shapes(source: Source) -> list[tuple[str, tuple[int, ...], str]]:
    return sorted((key.name, key.shape, key.dtype) for key in source.keys.values())


def outputs(loaded: LoadedModel, *, cached: bool = False) -> Tensor:
    """What a model gives for random inputs, always the same ones: [tokens or images, ..] float32, padding left out.

    cached  read the last token of a model that generates by itself, with what the model keeps of those before
    """
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if KINDS[loaded.kind].reads != "text":
            return _tensor(loaded.run(_pixels(loaded, draw)))
        generates = loaded.kind == "causal-lm"
        length = max(2, loaded.clip_length(_GENERATED if generates else _TOKENS))
        vocabulary = int(loaded.text_config.vocab_size)
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, (2, length), generator=draw)
        if generates:
            return _decoded(loaded, ids, cached)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, length - length // 3 :] = False
        found = _tensor(loaded.run(ids, mask))
        return found[mask] if found.ndim == 3 and found.shape[:2] == mask.shape else found


def _pixels(loaded: LoadedModel, draw: torch.Generator) -> Tensor:
    config = getattr(loaded.config, "vision_config", loaded.config)
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    return torch.randn((2, getattr(config, "num_channels", 3), size, size), generator=draw)


def _tensor(out: Any) -> Tensor:
    logits = getattr(out, "logits", None)
    found = out if isinstance(out, Tensor) else out[0] if logits is None else logits
    return found.float()


def _decoded(loaded: LoadedModel, ids: Tensor, cached: bool) -> Tensor:
    """Logits of two sequences, [tokens, vocabulary]: one of two halves, as far apart as positions are, one padded."""
    module: Any = loaded.module
    length = ids.shape[1]
    mask = torch.ones_like(ids)
    mask[1, : min(_PADDING, length - 2)] = 0
    last = getattr(loaded.text_config, "max_position_embeddings", None)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    if isinstance(last, int) and last > 2 * length:
        places[0, length // 2 :] += last - length
    takes = "position_ids" in inspect.signature(module.forward).parameters
    kept: dict[str, Any] = {}
    found = []
    for low, high in ((0, length - 1), (length - 1, length)) if cached else ((0, length),):
        where = {"position_ids": places[:, low:high]} if takes else {}
        out = module(input_ids=ids[:, low:high], attention_mask=mask[:, :high], use_cache=cached, **where, **kept)
        found.append(_tensor(out))
        kept = {"past_key_values": getattr(out, "past_key_values", None)}
        if cached and kept["past_key_values"] is None:
            return _decoded(loaded, ids, False)
    return torch.cat(found, 1)[mask.bool()]


def difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest expected output or to 1; inf for one that is no number."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((expected - found).abs().max()) / max(1.0, float(expected.abs().max()))
