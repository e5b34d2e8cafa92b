"""From a recipe to an inspection: which tensors can be compared, the passes over each, the sums over groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import numpy as np

from weightsmith.core.errors import PlanError, WeightsmithError
from weightsmith.core.keys import Key, layer_of
from weightsmith.core.pass_ import fold
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.engine.context import Context
from weightsmith.engine.stream import each_tensor, looking, observe
from weightsmith.inputs.opened import Inputs
from weightsmith.inspect.advice import Advice, advise
from weightsmith.inspect.facts import Measures, measures, outvoted_by_chance
from weightsmith.inspect.spectra import Spectrum, small_enough, spectral_totals
from weightsmith.inspect.survey import survey
from weightsmith.io.read.vocabulary import difference
from weightsmith.jobs.nested import open_inputs
from weightsmith.ops.spectral import Svd
from weightsmith.recipe.schema import Recipe

__all__ = ["SIDE", "Inspection", "inspect"]

SIDE = 1024
"""Default of the largest smaller side of a matrix whose spectra are measured: beyond, they take far longer than
all the rest (an eigendecomposition per matrix and expert)."""

ROLES = ("embed", "norm", "q", "k", "v", "qkv", "o", "router", "gate", "up", "gate_up", "down", "head", "other")
"""Roles in the order in which a block uses them."""

Totals = Mapping[str, Any]


@dataclass(frozen=True)
class Inspection:
    """Everything that was found out.

    experts   names, in recipe order
    model     over all tensors
    layers    by block ('0', or 'encoder.0' where there are several stacks), and by role outside the blocks
    roles     by role ('q', 'down', 'norm', ...)
    cells     layer -> role -> figures
    tensors   by tensor
    left_out  tensor -> why it was not looked at
    side      matrices up to this smaller side have spectra; 0: none
    advice    what the figures speak for
    """

    experts: tuple[str, ...]
    model: Measures
    layers: Mapping[str, Measures]
    roles: Mapping[str, Measures]
    cells: Mapping[str, Mapping[str, Measures]]
    tensors: Mapping[str, Measures]
    left_out: Mapping[str, str]
    side: int
    advice: tuple[Advice, ...]


def inspect(
    recipe: Recipe,
    settings: Settings = DEFAULT,
    *,
    spectra: int = SIDE,
    sources: Inputs | None = None,
    **options: Any,
) -> Inspection:
    """Measure the task vectors of a recipe's models, without what `exclude` keeps; its method and rules do not matter.

    spectra   measure singular spectra of matrices up to this smaller side (and 16 spectra^2 entries); 0: of none
    options   change single settings: threads, device, progress

    Reads blocks: memory does not grow with the models, except for one matrix of one expert (per thread) at a time
    where spectra are measured.  The same figures for every thread count.

    Raises PlanError if an input cannot be opened, there is no base, or nothing in it can be compared.
    """
    settings = settings.but(**options)
    inputs = sources if sources is not None else open_inputs(recipe)
    keys, left_out = _comparable(inputs, recipe.exclude)
    context = looking(inputs, settings, nonfinite=recipe.nonfinite)
    found = each_tensor(keys, partial(_totals, context=context, side=spectra), settings)
    inputs.fingerprints()  # refuses inputs that were changed meanwhile
    names = tuple(inputs.experts)
    model = _together(found[key.name] for key in keys)
    inner = [key for key in keys if key.role not in ("embed", "head")]
    inside = _together(found[key.name] for key in inner) if inner and len(inner) < len(keys) else None
    layers = _grouped(keys, _layer_names(keys))
    return Inspection(
        experts=names,
        model=model,
        layers={layer: _together(found[k.name] for k in members) for layer, members in layers.items()},
        roles={
            role: _together(found[k.name] for k in members)
            for role, members in _grouped(keys, _role_names(keys)).items()
        },
        cells={
            layer: {
                role: _together(found[k.name] for k in few)
                for role, few in _grouped(members, _role_names(members)).items()
            }
            for layer, members in layers.items()
        },
        tensors={key.name: measures(found[key.name]) for key in keys},
        left_out=left_out,
        side=spectra,
        advice=advise(model, names, inside),
    )


# --- which tensors -----------------------------------------------------------------------------------


def _comparable(inputs: Inputs, exclude: Sequence[str] = ()) -> tuple[list[Key], dict[str, str]]:
    """The tensors that the base and all experts hold in one shape, and why the others are not looked at."""
    if inputs.problems:
        raise PlanError(inputs.problems)
    if inputs.base is None:
        raise PlanError(["inspect compares task vectors, which need a base model: add 'base:' to the recipe"])
    unlike = {name: _unlike(inputs, name) for name in inputs.experts}
    keys, left_out = [], {}
    for key in inputs.base.keys.values():
        excluded = any(fnmatchcase(key.name, glob) for glob in exclude)
        if reason := "excluded by the recipe" if excluded else _reason(key, inputs, unlike):
            left_out[key.name] = reason
        else:
            keys.append(key)
    for expert, source in inputs.experts.items():
        for name in source.keys:
            if inputs.base.aliases.get(name, name) not in inputs.base.keys:
                left_out.setdefault(name, f"only in {expert}")
    if not keys:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3]) or "the base is empty"
        raise PlanError([f"the base and the models have no floating tensor in common, nothing to inspect ({why})"])
    return keys, left_out


def _unlike(inputs: Inputs, expert: str) -> str | None:
    assert inputs.base is not None
    try:
        return difference(inputs.base.origin.folder, inputs.experts[expert].origin.folder)
    except WeightsmithError as error:
        raise PlanError([f"{expert}: {error}"]) from error


def _reason(key: Key, inputs: Inputs, unlike: Mapping[str, str | None]) -> str | None:
    """Why a tensor of the base cannot be compared, or None."""
    if not key.floating:
        return f"{key.dtype}, not a weight"
    if not key.numel:
        return "empty"
    for name, source in inputs.experts.items():
        if source.aliases.get(key.name, key.name) not in source.keys:
            return f"missing in {name}"
        other = source.key(key.name)
        if other.shape != key.shape or not other.floating:
            return f"{other.dtype} {list(other.shape)} in {name}, {key.dtype} {list(key.shape)} in the base"
        if key.role in ("embed", "head") and unlike[name]:
            return f"unlike vocabulary in {name}: {unlike[name]}"
    return None


def _layer_names(keys: Iterable[Key]) -> dict[str, str]:
    """Tensor -> name of its block, or its role outside the blocks; in order: embeddings, blocks, the rest."""
    places = {key: layer_of(key.name) for key in keys}
    stacks = {place[0] for place in places.values() if place}

    def rank(key: Key) -> tuple[int, str, int]:
        place = places[key]
        return (1, *place) if place else (0 if key.role == "embed" else 2, key.role, 0)

    names = {}
    for key in sorted(places, key=rank):
        place = places[key]
        names[key.name] = key.role if not place else str(place[1]) if len(stacks) == 1 else ".".join(map(str, place))
    return names


def _role_names(keys: Iterable[Key]) -> dict[str, str]:
    """Tensor -> role, in the order of `ROLES`."""
    return {key.name: key.role for key in sorted(keys, key=lambda key: ROLES.index(key.role))}


def _grouped(keys: Iterable[Key], names: Mapping[str, str]) -> dict[str, list[Key]]:
    """Keys by what `names` calls them, in the order of `names`."""
    groups: dict[str, list[Key]] = {name: [] for name in names.values()}
    for key in keys:
        groups[names[key.name]].append(key)
    return groups


def _together(totals: Iterable[Totals]) -> Measures:
    """Figures over several tensors.  Those without spectra add nothing to the spectral ones."""
    return measures(fold(totals))


# --- one tensor --------------------------------------------------------------------------------------


def _totals(key: Key, context: Context, side: int) -> Totals:
    """All sums over one tensor."""
    passes = survey(len(context.inputs.experts))
    overall, _, largest = passes
    results = observe(key, passes, context)
    found = {name: np.asarray(value) for one in (overall, largest) for name, value in results[one].items()}
    found |= {"tensors": np.asarray(1), "entries": np.asarray(key.numel)}
    found["chance"] = np.asarray(outvoted_by_chance(found, key.numel))
    return {**found, **_spectra(key, context)} if small_enough(key, side) else found


def _spectra(key: Key, context: Context) -> Totals:
    """Spectral sums over one matrix; each expert is read by itself, so that one matrix at a time is in memory."""
    lead, spectrum = min(key.shape) // len(context.inputs.experts), Spectrum()
    triplets = []
    for name, source in context.inputs.experts.items():
        alone = replace(context, inputs=Inputs(context.inputs.base, {name: source}))
        found: Svd | None = observe(key, (spectrum,), alone)[spectrum]
        if found is None:
            return {}
        triplets.append(Svd(found.u[:, :lead].clone(), found.s, found.v[:, :lead].clone()))
    return spectral_totals(triplets, key.shape)
