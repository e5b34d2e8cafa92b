"""Scale single components of attention heads: an exact rank-1 change of W_O; and steering in a subspace while running.

OV' = OV + (f - 1) s_c u_c v_c^T is written back to W_O alone: W_O' = W_O + (f - 1) s_c (R_v^-1 u'_c) v_c^T, with
W_V = Q_v R_v and u_c = Q_v u'_c (arXiv:2406.09519).  Heads that share their values keep them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.align.composition import components
from weightsmith.align.heads import heads_of, places
from weightsmith.align.parts import Model
from weightsmith.core.errors import RecipeError
from weightsmith.core.lazy import torch
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Block, Source
from weightsmith.io.read.views import View
from weightsmith.jobs.job import Result
from weightsmith.jobs.merge import run
from weightsmith.recipe.schema import ModelRef, Recipe, StageSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["EditedSource", "Scale", "edit", "parse_scales", "scaled", "steering"]


@dataclass(frozen=True)
class Scale:
    """A factor for one component of one head; 0 takes it out, 1 changes nothing."""

    layer: int
    head: int
    component: int
    factor: float


def parse_scales(words: Iterable[str]) -> list[Scale]:
    """'7.9.0=0' is layer 7, head 9, component 0, factor 0."""
    found = []
    for word in words:
        parts = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)=([-+]?[0-9.]+(?:e[-+]?\d+)?)", word)
        if parts is None:
            raise RecipeError(f"{word!r} is no scale; write LAYER.HEAD.COMPONENT=FACTOR, as 7.9.0=0")
        found.append(Scale(int(parts[1]), int(parts[2]), int(parts[3]), float(parts[4])))
    return found


class EditedSource(View):
    """A source with low-rank changes added to some matrices: name -> (left [rows, r], right [r, columns]) float64."""

    shows = "edited"

    def __init__(self, source: Source, changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__(source)
        self.changes = dict(changes)

    def computes(self, name: str) -> bool:
        return self.key(name).name in self.changes or super().computes(name)

    def read_cost(self, name: str) -> float:
        return super().read_cost(name) + (5.0 if self.key(name).name in self.changes else 0.0)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        if key.name not in self.changes:
            return super().block(name, low, high, into)
        left, right = self.changes[key.name]
        whole = self.source.read(key.name, low, high).double() + left[low:high] @ right
        return whole if key.dtype == "float64" else whole.float()

    def fingerprint(self) -> dict[str, Any]:
        changes = {n: [float(t.double().norm()) for t in pair] for n, pair in self.changes.items()}
        return {"view": self.shows, "source": self.source.fingerprint(), "changes": changes}


def scaled(source: Source, scales: Sequence[Scale], *, fold: bool = True) -> EditedSource:
    """The model with some components scaled, numbered as `composition.components` does with the same `fold`.

    Raises RecipeError for heads or components that there are not, or named twice.
    """
    model = Model(source)
    found = {place.layer: place for place in places(model)}
    changes: dict[str, list[tuple[Tensor, Tensor]]] = {}
    seen: set[tuple[int, int, int]] = set()
    read: dict[int, Any] = {}
    for one in scales:
        where = (one.layer, one.head, one.component)
        spelt = ".".join(map(str, where))
        if one.layer not in found or one.head >= found[one.layer].count:
            raise RecipeError(f"{spelt}: there is no such head")
        place = found[one.layer]
        if one.component >= place.shape.value:
            raise RecipeError(f"{spelt}: a head has {place.shape.value} components, numbered from 0")
        if where in seen:
            raise RecipeError(f"{spelt} is scaled twice")
        seen.add(where)
        if one.layer not in read:
            heads = heads_of(model, place, fold)
            read[one.layer] = (heads, *components(heads))
        heads, u, s, v = read[one.layer]
        # W_V x = u_c: the least norm solution where W_V has not full rank, and exact where it has
        inside = torch.linalg.pinv(heads.v[one.head].mT) @ u[one.head, :, one.component]
        row = torch.zeros(place.count * place.shape.value, dtype=torch.float64)
        at = one.head * place.shape.value
        row[at : at + place.shape.value] = (one.factor - 1) * s[one.head, one.component] * inside
        pair = (row[:, None], v[one.head, one.component][None])  # [heads x entries, 1] and [1, width], as W_O
        output = place.weights["o"]
        changes.setdefault(output.key.name, []).append(pair if output.out == 1 else (pair[1].T, pair[0].T))
    joined = {
        name: (torch.cat([left for left, _ in pairs], 1), torch.cat([right for _, right in pairs]))
        for name, pairs in changes.items()
    }
    return EditedSource(source, joined)


def edit(
    model: str | Path | Source, out: Path, scales: Sequence[Scale], *, fold: bool = True, **options: Any
) -> Result:
    """Write a model with some components scaled; all else is copied.  Options: fields of `Settings`."""
    source = open_source(model)
    view = scaled(source, scales, fold=fold)
    recipe = Recipe(models={"model": ModelRef(model=str(source))}, method=(StageSpec(name="passthrough"),))
    return run(recipe, out, sources=Inputs(None, {"model": view}), **options)


def steering(directions: Tensor, target: Tensor | None = None, scale: float = 1.0) -> Any:
    """A forward hook that edits what a module gives in the span of some directions.

    directions: [k, width], e.g. write directions v_c;  target: [k] coordinates in their orthonormal basis to set, or
    None to multiply what is there by `scale`.  x <- x + (target - x P) P^T, or x + (scale - 1) (x P) P^T.  The module's
    output is [..., width], or a tuple that begins with it.  Register it with `module.register_forward_hook(hook)`.
    """
    basis = torch.linalg.qr(directions.double().T).Q

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        p = basis.to(x)
        here = x @ p
        wanted = scale * here if target is None else target.to(x).expand_as(here)
        changed = x + (wanted - here) @ p.T
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
