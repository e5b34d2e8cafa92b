"""Which numbers of a recipe are learned, and how finely.

A space is a value: parameter name -> `Free`.  `Numbers` are the tensors that an optimizer moves for one of them, the
link from those to the parameter's values, and the cells that plans and gradients know the values by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.keys import Key
from weightsmith.core.parameter import Parameter, Traced, Vector
from weightsmith.recipe.table import Table

__all__ = ["GRAINS", "LINKS", "Free", "Numbers"]

GRAINS = ("model", "layer", "tensor", "chunk", "group", "entry")
"""How finely: one number per model, per block, per tensor, or several within a tensor (by the filter `scale`)."""


@dataclass(frozen=True)
class Link:
    """From the optimizer's numbers z to values: `value(z)`, and back, `start(values)`; both [rows, models]."""

    value: Callable[[Tensor], Tensor]
    start: Callable[[Tensor], Tensor]
    low: float = -math.inf
    high: float = math.inf


LINKS: Mapping[str, Link] = {
    "identity": Link(lambda z: z, lambda v: v),
    "clamp": Link(lambda z: z, lambda v: v),
    "sigmoid": Link(torch.sigmoid, torch.logit, 0.0, 1.0),
    "softmax": Link(lambda z: z.softmax(dim=1), torch.log, 0.0, math.inf),
    "concrete": Link(lambda z: rescaled(z.sigmoid()), lambda v: v),
}
"""clamp: the numbers are put back into [low, high] after every step, so that one at the edge may return; sigmoid:
values in (0, 1); softmax: over the models, so that they sum to 1; concrete: the numbers are logits of a relaxed
Bernoulli mask, drawn anew at every step and divided by its mean over the tensor; the result has the mean mask
sigmoid(z), divided too."""

TINY = 1e-6
"""Mean below which a mask has vanished; and how far a draw stays from 0 and 1."""


def rescaled(mask: Tensor) -> Tensor:
    """A mask over its mean over the tensor: [1, numel] -> [1, numel]; the mean is differentiated through."""
    return mask / mask.mean(dim=1, keepdim=True).clamp(min=TINY)


@dataclass(frozen=True)
class Free:
    """One parameter that is learned.

    per     see GRAINS; outside the blocks, `layer` has one number for all tensors
    parts   numbers per tensor for chunk and group: one count, or globs over tensor names -> count, the first that fits
    start   the value at the beginning; a mapping: of each model
    link    see LINKS
    low     bounds of link clamp; default: the parameter's own
    shared  one number for all models (what parameters have that do not differ between models, and masks)
    temperature, seed  of link concrete

    Raises RecipeError for a start outside the link's range.
    """

    per: str = "tensor"
    parts: int | Mapping[str, int] = 1
    start: float | Mapping[str, float] = 0.3
    link: str = "identity"
    low: float | None = None
    high: float | None = None
    shared: bool = False
    temperature: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for what, word, known in (("per", self.per, GRAINS), ("link", self.link, tuple(LINKS))):
            if word not in known:
                raise RecipeError(f"free: {what} {word!r} is unknown{did_you_mean(word, known)}")
        if self.link == "softmax" and (self.several or self.shared):
            raise RecipeError(
                "free: link softmax is over the models; use it with per: model, layer or tensor, not shared"
            )
        if not self.temperature > 0:
            raise RecipeError(f"free: temperature = {self.temperature:g} is not above 0")
        if self.link == "concrete" and not (self.per == "entry" and self.shared):
            raise RecipeError("free: link concrete is one mask for all models; use it with per: entry and shared: true")
        link = LINKS[self.link]
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        for value in self.start.values() if isinstance(self.start, Mapping) else (self.start,):
            if self.link in ("sigmoid", "softmax") and not link.low < value < link.high:
                raise RecipeError(
                    f"free: start {value:g} is outside ({link.low:g}, {link.high:g}), the range of {self.link}"
                )
            if not low <= value <= high:
                raise RecipeError(f"free: start {value:g} is outside [{low:g}, {high:g}]")

    @property
    def several(self) -> bool:
        """Whether a tensor has several numbers."""
        return self.per in ("chunk", "group", "entry")

    def count(self, key: Key) -> int:
        """How many numbers a tensor has; 0: it is not free."""
        if self.per == "entry":
            return key.numel
        if not isinstance(self.parts, Mapping):
            return min(self.parts, max(key.numel, 1))
        found = (count for glob, count in self.parts.items() if fnmatchcase(key.name, glob))
        return min(next(found, 1), max(key.numel, 1))


class Numbers:
    """What is learned of one parameter, for the tensors that a plan merges.

    raw    tensors that the optimizer moves: one [rows, n], or one [n, c] for each tensor; float32
    table  tensor -> model -> traced value, for the recipe
    """

    def __init__(self, name: str, free: Free, parameter: Parameter, models: Sequence[str], keys: Sequence[Key]) -> None:
        if not parameter.smooth:
            raise RecipeError(
                f"free: {name} is not learned by gradients: the merge has no derivative with respect to it; "
                "try several numbers in a sweep"
            )
        if free.several and not parameter.several:
            raise RecipeError(
                f"free: {name} is one number per tensor; for per: {free.per} put the filter 'scale' before the method "
                "and free its 'factor'"
            )
        self.name, self.free, self.keys = name, free, list(keys)
        self.models = ("",) if free.shared or not parameter.each else tuple(models)
        self.low = max(parameter.low, -math.inf if free.low is None else free.low)
        self.high = min(parameter.high, math.inf if free.high is None else free.high)
        start = torch.tensor([self._start(model) for model in self.models])
        if free.several:
            kept = [(key, free.count(key)) for key in keys]
            self._rows = {key.name: i for i, (key, count) in enumerate(k for k in kept if k[1] > 0)}
            shapes = [count for _, count in kept if count > 0]
            values = [start[:, None].expand(-1, count).clone() for count in shapes]
            self.fixed = {key.name: start for key, count in kept if count <= 0}
        else:
            places = dict.fromkeys(self._place(key) for key in keys)
            order = {place: i for i, place in enumerate(places)}
            self._rows = {key.name: order[self._place(key)] for key in keys}
            values = [start[None].expand(len(places), -1).clone()]
            self.fixed = {}
        link = LINKS[free.link]
        self.raw = [link.start(value).requires_grad_() for value in values]
        self._cells = [value.clone() for value in values]
        self._leaves = [self._split(cells) for cells in self._cells]
        self.step: int | None = None  # whose mask is drawn; None: the mean
        self.table = Table({key.name: self._of(key.name) for key in keys}, f"free: {name}")

    def _start(self, model: str) -> float:
        start = self.free.start
        if not isinstance(start, Mapping):
            return float(start)
        if model not in start:
            raise RecipeError(f"free: {self.name} has no start for {model}{did_you_mean(model, start)}")
        return float(start[model])

    def _place(self, key: Key) -> Any:
        return {"model": "", "layer": key.layer}.get(self.free.per, key.name)

    def _split(self, cells: Tensor) -> list[list[Tensor]]:
        """Views of the cells, which merges see: [row][model], numbers or vectors [c]."""
        if self.free.several:
            return [[row.detach().requires_grad_() for row in cells.unbind()]]
        return [[cell.detach().requires_grad_() for cell in row.unbind()] for row in cells.unbind()]

    def _of(self, name: str) -> dict[str, Any]:
        if name in self.fixed:
            return dict(zip(self.models, self.fixed[name].tolist(), strict=True))
        row = self._rows[name]
        leaves = self._leaves[row][0] if self.free.several else self._leaves[0][row]
        made = [Traced(leaf) if leaf.ndim == 0 else Vector(leaf) for leaf in leaves]
        return dict(zip(self.models, made, strict=True))

    @property
    def count(self) -> int:
        """How many numbers are learned."""
        return sum(raw.numel() for raw in self.raw)

    @property
    def drawn(self) -> bool:
        """Whether values are drawn anew at every step."""
        return self.free.link == "concrete"

    def values(self) -> list[Tensor]:
        """The values, with the graph from `raw`; of a step, where they are drawn."""
        if self.drawn and self.step is not None:
            return [self._mask(raw, i, self.step) for i, raw in enumerate(self.raw)]
        return [LINKS[self.free.link].value(raw) for raw in self.raw]

    def _mask(self, raw: Tensor, place: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.free.seed, step, place)) & 0x7FFFFFFF)
        u = torch.rand(raw.shape, generator=generator).clamp(TINY, 1 - TINY)
        return rescaled(((raw + u.logit()) / self.free.temperature).sigmoid())

    def put(self) -> None:
        """Write the values to where merges see them."""
        with torch.no_grad():
            for cells, value in zip(self._cells, self.values(), strict=True):
                cells.copy_(value)

    def backward(self, found: Mapping[Tensor, Tensor]) -> None:
        """Add the gradient of the values, by cell, to that of `raw`."""
        for value, rows in zip(self.values(), self._leaves, strict=True):
            gradients = [torch.stack([found[leaf] for leaf in row]) for row in rows]
            torch.autograd.backward(value, gradients[0] if self.free.several else torch.stack(gradients))

    def project(self) -> None:
        """Put the numbers back into their bounds."""
        if self.free.link in ("identity", "clamp"):
            with torch.no_grad():
                for raw in self.raw:
                    raw.clamp_(self.low, self.high)

    def learned(self) -> dict[str, Tensor]:
        """Tensor name -> values [n] or [n, c]; [1] and [1, c] for all models alike."""
        values = [LINKS[self.free.link].value(raw).detach() for raw in self.raw]
        found = dict(self.fixed)
        for name, row in self._rows.items():
            found[name] = values[row] if self.free.several else values[0][row]
        return {key.name: found[key.name].clone() for key in self.keys}
