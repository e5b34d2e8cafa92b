"""Running a model of any kind on a few inputs, and comparing what comes out with what its parents say."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import SourceError
from weightsmith.core.lazy import torch
from weightsmith.io import system
from weightsmith.observe.kinds import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.observe.model import LoadedModel

__all__ = ["Found", "apart", "buffer_problems", "compared", "probe", "takes_pictures"]

_TEXTS = 16
_TOKENS = 64


@dataclass(frozen=True, eq=False)
class Found:
    """What came out.

    features  one row for each input (of encoders), or for each token or picture (of models that give logits): float64
    logits    whether the rows are logits
    inputs    how many inputs there were, in words
    finite    whether all that came out is
    notes     what was done otherwise than a user would
    texts     the token ids
    """

    features: Tensor
    logits: bool
    inputs: str
    finite: bool
    notes: tuple[str, ...] = ()
    texts: tuple[Tensor, ...] = ()


def probe(loaded: LoadedModel, text: str, like: Found | None = None) -> Found:
    """Run a model on sentences of `text` (without a tokenizer on those of `like`), or on noise: images or sound.

    Raises SourceError where nothing is known to run it on.
    """
    rows: list[Tensor] = []
    finite, logits, notes, counts = True, False, list[str](), list[str]()
    texts: list[Tensor] = []
    with torch.no_grad():
        for what, inputs in _inputs(loaded, text, like, notes):
            counts.append(f"{len(inputs)} {what}")
            texts += inputs if what == "texts" else []
            for one in inputs:
                try:
                    out = loaded.run(one[None])
                except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
                    lines = str(error).splitlines() or [type(error).__name__]
                    raise SourceError(f"its forward pass does not take {what} ({lines[0]})") from error
                finite = finite and all(bool(torch.isfinite(t).all()) for t in _floating(out))
                found, logits = _features(out, _pooling(loaded.folder))
                rows.append(found.cpu().double())
    return Found(torch.cat(rows), logits, " and ".join(counts), finite, tuple(notes), tuple(texts))


def compared(one: Found, other: Found) -> dict[str, float] | None:
    """How alike the outputs of two models on the same inputs are; None if they have other shapes.

    cosine, lowest  of the rows: their mean, and the least
    agreement       of logits: how often the largest is the same
    """
    if one.features.shape != other.features.shape:
        return None
    cosines = torch.nn.functional.cosine_similarity(one.features, other.features, dim=-1)
    cosines = cosines.clamp(-1, 1)  # rounding may lead beyond
    found = {"cosine": float(cosines.mean()), "lowest": float(cosines.min())}
    if one.logits:
        found["agreement"] = float((one.features.argmax(-1) == other.features.argmax(-1)).double().mean())
    return found


def apart(one: Found, other: Found) -> str:
    """Why the outputs of a result and of a parent, which have other shapes, cannot be compared."""
    mine, theirs = (sum(len(text) for text in found.texts) for found in (one, other))
    if one.logits is not other.logits:
        return "it has another head: only one of the two gives logits"
    if one.features.shape[1] != other.features.shape[1]:
        what = "logits (another vocabulary, or other labels)" if one.logits else "numbers for each input"
        return f"it gives {other.features.shape[1]} {what}, the result {one.features.shape[1]}"
    if mine != theirs:
        return f"its tokenizer makes {theirs} tokens of the texts, the result's {mine}: no outputs are of one token"
    return f"it gives {len(other.features)} outputs for the same inputs, the result {len(one.features)}"


def takes_pictures(loaded: LoadedModel) -> bool:
    """Whether a model reads pictures beside its text."""
    return "pixel_values" in inspect.signature(loaded.module.forward).parameters


def buffer_problems(loaded: LoadedModel) -> list[str]:
    """What is wrong with the stored tensors that are no parameters: running statistics, position ids."""
    parameters = {name for name, _ in loaded.module.named_parameters(remove_duplicate=False)}
    problems = []
    for name, held in loaded.module.state_dict().items():
        if name in parameters:
            continue
        if held.is_floating_point() and not bool(torch.isfinite(held).all()):
            problems.append(f"{name}: NaN or Inf in a buffer")
        elif name.endswith("running_var") and bool((held < 0).any()):
            problems.append(f"{name}: a variance below 0")
    source = loaded.names.source
    for name, key in source.keys.items() if source is not None else ():
        if name.rpartition(".")[2] == "position_ids":
            assert source is not None
            ids = source.read(name).reshape(-1)
            if not torch.equal(ids.double(), torch.arange(key.numel, dtype=torch.float64)):
                problems.append(f"{name}: not 0, 1, 2, ...; keep it as the base has it (exclude)")
    return problems


# --- inputs --------------------------------------------------------------------------------------


def _inputs(loaded: LoadedModel, text: str, like: Found | None, notes: list[str]) -> Iterator[tuple[str, list[Tensor]]]:
    """(what they are, the inputs without a batch axis)."""
    reads = KINDS[loaded.kind].reads
    if "text" in reads:
        yield "texts", _texts(loaded, text, like, notes)
    if "image" in reads:
        yield "images of noise", list(_noise(4, _image_shape(loaded.config)))
    if reads == "sound":
        yield "sounds of noise", list(_noise(2, _sound_shape(loaded.config)) * 0.1)


def _texts(loaded: LoadedModel, text: str, like: Found | None, notes: list[str]) -> list[Tensor]:
    from weightsmith.observe.model import text_coder

    length = loaded.clip_length(_TOKENS)
    try:
        coder = text_coder(loaded)
    except SourceError as error:
        if like is not None:
            return list(like.texts)
        notes.append(f"run on made-up token ids: {error}")
        count = min(getattr(loaded.text_config, "vocab_size", 64), length)
        return [torch.arange(count).roll(shift) for shift in range(4)]
    sentences = [one for one in re.split(r"(?<=[.!?])\s+", text) if one.strip()][:_TEXTS]
    return [torch.tensor(ids) for one in sentences if (ids := coder.example(one, length))]


def _noise(count: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def _image_shape(config: Any) -> tuple[int, ...]:
    config = getattr(config, "vision_config", getattr(config, "encoder", config))
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if isinstance(size, dict):
        size = (size.get("height"), size.get("width"))
    pair: list[Any] = list(size) if isinstance(size, (list, tuple)) and len(size) == 2 else [size or 224] * 2
    return channels, int(pair[0]), int(pair[1])


def _sound_shape(config: Any) -> tuple[int, ...]:
    bins = getattr(config, "num_mel_bins", None)
    if bins and (frames := getattr(config, "max_source_positions", None)):
        return bins, 2 * frames  # Whisper: a spectrogram of 30 seconds, halved by the first convolutions
    if bins and (frames := getattr(config, "max_length", None)):
        return frames, bins
    if width := getattr(config, "feature_projection_input_dim", None):
        return 64, width
    return (16_000,)  # a second


# --- outputs -------------------------------------------------------------------------------------


def _floating(out: Any) -> Iterator[Tensor]:
    """All floating tensors of an output, however nested."""
    if isinstance(out, torch.Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, Mapping):
        for value in out.values():
            yield from _floating(value)
    elif isinstance(out, (list, tuple)):
        for value in out:
            yield from _floating(value)


def _features(out: Any, pooling: str) -> tuple[Tensor, bool]:
    """([rows, width], whether they are logits) of the output for one input."""
    if (start := getattr(out, "start_logits", None)) is not None:
        return torch.stack([start[0], out.end_logits[0]], -1), True
    for name in ("logits", "prediction_logits"):
        if (found := getattr(out, name, None)) is not None:
            found = found.movedim(1, -1) if found.ndim == 4 else found  # classes of pixels
            return found.reshape(-1, found.shape[-1]), True
    for name in ("text_embeds", "image_embeds"):
        if (found := getattr(out, name, None)) is not None:
            return found.reshape(1, -1), False
    hidden = getattr(out, "last_hidden_state", None)
    if hidden is None:
        hidden = next(_floating(out))
    if hidden.ndim == 3:
        return {"cls": hidden[:, 0], "last": hidden[:, -1], "max": hidden.amax(1)}.get(pooling, hidden.mean(1)), False
    return (hidden.mean((-2, -1)) if hidden.ndim == 4 else hidden).reshape(1, -1), False


_POOLING = {"pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last", "pooling_mode_max_tokens": "max"}


def _pooling(folder: Path | None) -> str:
    """How sentence-transformers makes one vector of a text's tokens; else, and by default, their mean."""
    for path in sorted(system.call(list, folder.glob("*_Pooling/config.json"))) if folder is not None else ():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            said = json.loads(system.read_file(path).decode())
            return next((mode for field, mode in _POOLING.items() if said.get(field) is True), "mean")
    return "mean"
