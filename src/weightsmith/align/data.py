"""Orders of a transformer's units from what both models do on data: by activations, or learned (arXiv:2209.04836)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from weightsmith.align.match import match
from weightsmith.align.parts import Model
from weightsmith.align.parts import Tensor as Part
from weightsmith.align.ste import straight_through
from weightsmith.core.errors import NumericError, SourceError
from weightsmith.core.symmetry import Orders, SymmetryGroup
from weightsmith.io.read.source import Source
from weightsmith.observe.data import Batch, Example, batches, read_examples
from weightsmith.observe.model import LoadedModel, load_model, resting
from weightsmith.observe.tangents import refuse_tangent
from weightsmith.ops.assign import assigned

__all__ = ["Pair", "activations", "by_activations", "learned", "loaded_pair"]

_HELD = 2 << 30  # bytes of products of activations that are held at once; more take more passes over the data

Place = tuple[str, str]
"""A tensor, and 'in' or 'out': the inputs or the outputs of the layer whose weight it is."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two models that can run, with examples for both.

    layers  of both: a weight as the checkpoint calls it -> its layer
    """

    reference: LoadedModel
    moving: LoadedModel
    examples: Sequence[Example]
    batch: int = 8

    def layers(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        first, second = (_layers(loaded) for loaded in (self.reference, self.moving))
        return first, second


def loaded_pair(reference: Any, moving: Any, data: str | Path, *, examples: int, length: int, batch: int = 8) -> Pair:
    """Load both models and the data; SourceError for what cannot be run."""
    found = []
    for model in (reference, moving):
        place = model.origin.folder if isinstance(model, Source) else model
        if place is None:
            raise SourceError(f"{model}: no folder with a model that could run; match it by weights")
        found.append(load_model(place, device="cpu"))
        refuse_tangent(found[-1])
    return Pair(found[0], found[1], read_examples(data, found[0], examples=examples, length=length), batch)


def _layers(loaded: LoadedModel) -> dict[str, nn.Module]:
    found = {}
    for name, module in loaded.module.named_modules():
        if getattr(module, "weight", None) is not None and not any(True for _ in module.children()):
            stored = loaded.names.name(f"{name}.weight")
            if stored is not None:
                found[stored] = module
    return found


# --- activations -----------------------------------------------------------------------------------


def by_activations(source: Source, groups: Sequence[SymmetryGroup], pair: Pair) -> dict[str, np.ndarray]:
    """One assignment for each group: the order with the largest sum of x_i^A . x_j^B over tokens, units i and j.

    Units of an MLP and of heads are what the layer reads that follows them; those of the residual stream what each
    attention and MLP reads; entries of keys what queries and keys are.  Only products [n, n] are kept, in float32.
    Raises SourceError for groups whose units no layer shows by itself (experts), NumericError for NaN and Inf.
    """
    parts = {t.key.name: t for t in Model(source).tensors}
    shown = {group.name: _shown(group, parts) for group in groups}
    widths: dict[Place, int] = {}
    for group in groups:
        if not (places := shown[group.name].places):
            raise SourceError(
                f"{source}: no layer shows the units of {group.name} by itself; match it by weights, or --freeze it"
            )
        for name, side in places:
            widths[name, side] = parts[name].inputs if side == "in" else parts[name].outputs
    orders: dict[str, np.ndarray] = {}
    left = list(groups)
    while left:
        chosen: list[SymmetryGroup] = []
        size = 0
        while left and (not chosen or size + _bytes(shown[left[0].name], widths) <= _HELD):
            chosen.append(left.pop(0))
            size += _bytes(shown[chosen[-1].name], widths)
        wanted = dict.fromkeys(place for group in chosen for place in shown[group.name].places)
        products = _products(pair, list(wanted))
        for group in chosen:
            orders |= _order(group, shown[group.name], products)
    return orders


@dataclass(frozen=True)
class _Shown:
    """A group as activations show it: its axes are on axis 1 of [tokens, entries] of `places`, in order."""

    group: SymmetryGroup
    places: tuple[Place, ...]


def _shown(group: SymmetryGroup, parts: Mapping[str, Part]) -> _Shown:
    kept: list[int] = []
    places: list[Place] = []
    keys = {axis.name for small in group.inside if small.kind == "keys" for axis in small.axes}
    seen: set[tuple[str, bool]] = set()
    for number, axis in enumerate(group.axes):
        part = parts[axis.name]
        if part.into is None or part.packed:
            continue
        attends = part.part in ("q", "k", "v", "qkv")
        if axis.axis == part.into:
            if group.kind == "residual" and (part.part == "router" or (part.module, attends) in seen):
                continue  # what q reads, k and v read too
            seen.add((part.module, attends))
            side = "in"
        elif part.part in ("q", "k", "qkv") and str(number) in keys:
            side = "out"
        else:
            continue
        kept.append(number)
        places.append((axis.name, side))
    axes = tuple(replace(group.axes[n], name=str(i), axis=1) for i, n in enumerate(kept))
    new = {str(n): str(i) for i, n in enumerate(kept)}
    inside = tuple(
        replace(g, axes=tuple(replace(a, name=new[a.name], axis=1) for a in g.axes if a.name in new))
        for g in group.inside
    )
    return _Shown(replace(group, axes=axes, inside=tuple(g for g in inside if g.axes)), tuple(places))


def _bytes(shown: _Shown, widths: Mapping[Place, int]) -> int:
    return sum(4 * widths[place] ** 2 for place in dict.fromkeys(shown.places))


def _products(pair: Pair, places: Sequence[Place]) -> dict[Place, Tensor]:
    """X_A^T X_B summed over all tokens, float32: [entries, entries] of each place."""
    found: dict[Place, Tensor] = {}
    sides = pair.layers()
    for batch in batches(pair.examples, pair.batch):
        seen = [
            activations(loaded, layers, places, batch)
            for loaded, layers in zip((pair.reference, pair.moving), sides, strict=True)
        ]
        for place in places:
            a, b = (rows[place] for rows in seen)
            product = a.T @ b
            found[place] = found[place].add_(product) if place in found else product
    for (name, side), product in found.items():
        if not bool(torch.isfinite(product).all()):
            raise NumericError(
                f"{'inputs' if side == 'in' else 'outputs'} of {name} hold NaN or Inf; nothing is matched"
            )
    return found


def activations(
    loaded: LoadedModel, layers: Mapping[str, nn.Module], places: Sequence[Place], batch: Batch
) -> dict[Place, Tensor]:
    """[tokens, entries] of each place, without padding."""
    found: dict[Place, Tensor] = {}
    hooks = []
    mask = batch.mask

    def keep(place: Place, value: Tensor) -> None:
        rows = value.detach().float()
        fits = mask is not None and rows.shape[:-1] == mask.shape
        found[place] = rows[mask] if fits else rows.flatten(0, -2)

    for name, side in dict.fromkeys(places):
        if name not in layers:
            raise SourceError(f"{loaded.label}: no layer of the running model has the weight {name}; match by weights")
        if side == "in":
            hooks.append(
                layers[name].register_forward_pre_hook(lambda _, args, place=(name, side): keep(place, args[0]))
            )
        else:
            hooks.append(layers[name].register_forward_hook(lambda _, __, out, place=(name, side): keep(place, out)))
    try:
        with resting(loaded.module), torch.no_grad():
            loaded.run(batch.inputs, mask)
    finally:
        for hook in hooks:
            hook.remove()
    if lost := [name for name, side in places if (name, side) not in found]:
        raise SourceError(f"{loaded.label}: the layer with {lost[0]} did not run by itself; match by weights")
    return found


def _order(group: SymmetryGroup, shown: _Shown, products: Mapping[Place, Tensor]) -> dict[str, np.ndarray]:
    matrices = [products[place] for place in shown.places]
    plain = all(a.outer == a.inner == 1 for a in shown.group.axes)
    if plain and not group.inside:
        size = group.size
        total = sum(
            m[a.start : a.start + size, a.start : a.start + size].double()
            for a, m in zip(shown.group.axes, matrices, strict=True)
        )
        assert isinstance(total, Tensor)
        return {group.name: assigned(total.numpy())}
    # <I, pi(X_A^T X_B)> is the sum over units of x_i^A . x_pi(i)^B: heads are solved as those of weights are.
    moving = {str(i): m for i, m in enumerate(matrices)}
    ones = {name: torch.eye(len(m)) for name, m in moving.items()}
    return dict(match([shown.group], ones, moving).orders)


# --- learned ---------------------------------------------------------------------------------------


def learned(groups: Sequence[SymmetryGroup], pair: Pair, *, epochs: int, lr: float, seed: int = 0) -> Orders:
    """The orders that straight-through gradients find on labelled data (or next tokens); see `ste.straight_through`.

    Raises SourceError for models whose tensors are stored in another form than they run in.
    """
    module = pair.reference.module
    stored = {name: pair.reference.names.name(name) for name, _ in module.named_parameters()}
    names = {own: name for name, own in stored.items() if own is not None}
    if lost := [name for group in groups for name in group.names if name not in names]:
        raise SourceError(
            f"{pair.reference.label}: {lost[0]} is stored in another form than it runs in; match by weights"
        )
    placed = [replace(g, axes=tuple(replace(a, name=names[a.name]) for a in g.axes)) for g in groups]
    states = [{n: p.detach() for n, p in loaded.module.named_parameters()} for loaded in (pair.reference, pair.moving)]
    loss = _loss(pair.reference)
    draw = np.random.default_rng(seed)

    def rounds() -> Iterator[tuple[Batch, Tensor]]:
        for _ in range(epochs):
            order = [pair.examples[i] for i in draw.permutation(len(pair.examples))]
            for start in range(0, len(order), pair.batch):
                own = order[start : start + pair.batch]
                (batch,) = batches(own, pair.batch)
                yield batch, torch.tensor([-1 if e.label is None else e.label for e in own])

    with resting(module):
        return straight_through(module, placed, states[0], states[1], rounds(), loss, lr=lr).orders


def _loss(loaded: LoadedModel) -> Callable[[Callable[..., Any], tuple[Batch, Tensor]], Tensor]:
    tokens = loaded.kind == "causal-lm"
    if not tokens and not loaded.kind.endswith(("image-classification", "sequence-classification")):
        raise SourceError(f"{loaded.label}: a model of the kind {loaded.kind} has no loss to learn from here")

    def loss(run: Callable[..., Any], given: tuple[Batch, Tensor]) -> Tensor:
        batch, labels = given
        if not tokens and bool((labels < 0).any()):
            raise SourceError(f"{loaded.label}: examples without labels; a classifier's loss needs them")
        out = run(batch.inputs) if batch.mask is None else run(batch.inputs, batch.mask.long())
        logits = out.logits.float()
        if not tokens:
            return cross_entropy(logits, labels)
        targets = batch.inputs if batch.mask is None else torch.where(batch.mask, batch.inputs, -100)
        return cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)

    return loss
