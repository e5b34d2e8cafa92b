"""Images beside changed views of them, and which of their first answers are trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from weightsmith.core.errors import SourceError
from weightsmith.tune.objective import logits_of

__all__ = ["Viewed", "Views", "viewed"]

Function = Callable[[nn.Module, Any], Any]

OFTEN = 1_000_000
"""Times that a sequence of views goes over its batches, each time with other views."""


@dataclass(frozen=True, eq=False)
class Viewed:
    """inputs: images and, behind them, a view of each, [2 b, channels, height, width]; labels: [b], -1: none."""

    inputs: Tensor
    labels: Tensor
    mask: None = None


class Views(Sequence[Viewed]):
    """Batches with a view of every image, drawn anew whenever the batch comes round; `times` as often as they are."""

    def __init__(self, batches: Sequence[Any], labels: Sequence[Tensor], seed: int, times: int) -> None:
        self._images, self._labels, self._seed, self._times = [images_of(b) for b in batches], labels, seed, times

    def __len__(self) -> int:
        return len(self._images) * self._times

    @overload
    def __getitem__(self, index: int) -> Viewed: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Viewed]: ...
    def __getitem__(self, index: int | slice) -> Viewed | Sequence[Viewed]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = index % len(self._images)
        draw = torch.Generator().manual_seed(hash((self._seed, index)) & 0x7FFFFFFF)
        images = self._images[place]
        return Viewed(torch.cat([images, torch.stack([_view(one, draw) for one in images])]), self._labels[place])


def images_of(batch: Any) -> Tensor:
    """The images of a batch: its `inputs` or `pixel_values`, the first of a pair, or the batch itself."""
    if isinstance(batch, Mapping):
        found = batch.get("pixel_values", batch.get("inputs"))
    else:
        found = batch[0] if isinstance(batch, (tuple, list)) else getattr(batch, "inputs", batch)
    if not isinstance(found, Tensor) or found.ndim != 4 or not found.is_floating_point():
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise SourceError(f"pseudo needs images [batch, channels, height, width] to make views of; got {shape}")
    return found


def _view(image: Tensor, draw: torch.Generator) -> Tensor:
    """A random part of half the area or more, with sides of 3:4 to 4:3, in the image's size; mirrored or not."""
    area, ratio, down, right, mirror = torch.rand(5, generator=draw).tolist()
    height, width = image.shape[-2:]
    side, slant = (0.5 + 0.5 * area) ** 0.5, (3 / 4) ** (1 - 2 * ratio)
    tall = max(1, min(height, round(height * side * slant**0.5)))
    wide = max(1, min(width, round(width * side / slant**0.5)))
    top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
    part = image[:, top : top + tall, left : left + wide]
    made = nn.functional.interpolate(part[None], (height, width), mode="bilinear", align_corners=False)[0]
    return made.flip(-1) if mirror < 0.5 else made


def viewed(
    batches: Sequence[Any], module: nn.Module, function: Function, *, trusted: int, seed: int, times: int = OFTEN
) -> Views:
    """Ask the module, as it is, about all images of a task, and trust the surest of each class.

    Of N images and C classes min(N / (10 C), trusted) of each class that is predicted.
    """
    with torch.no_grad():
        said = [logits_of(function(module.eval(), batch)).float().softmax(dim=-1).max(dim=-1) for batch in batches]
        classes = logits_of(function(module, batches[0])).shape[-1] if batches else 1
    sure, answers = (torch.cat([one[i].cpu() for one in said]) for i in (0, 1))
    count = min(len(answers) // (10 * classes), trusted)
    labels = torch.full_like(answers, -1)
    for label in answers.unique():  # type: ignore[no-untyped-call]
        (places,) = torch.nonzero(answers == label, as_tuple=True)
        labels[places[sure[places].argsort(descending=True, stable=True)[:count]]] = label
    each = labels.split([len(one.values) for one in said])  # type: ignore[no-untyped-call]
    return Views(batches, each, seed, times)
