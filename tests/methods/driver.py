"""Merging in memory, as the method contract says, in a few lines: what the engine must be equal to.

Blocks may be cut at any row.  Model-wide passes add up over blocks of a fixed number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.keys import Key, depths
from weightsmith.core.method import BASE, Grain, Pipeline, Rows, Scope, Stage, registry
from weightsmith.core.site import Site, Summary

Cut = Callable[[int], Sequence[tuple[int, int]]]
Stats = Mapping[str, Mapping[str, Mapping[str, Tensor]]]


def whole(rows: int) -> list[tuple[int, int]]:
    return [(0, rows)]


def every(step: int) -> Cut:
    """Blocks of `step` rows."""
    return lambda rows: [(low, min(low + step, rows)) for low in range(0, max(rows, 1), step)]


CANONICAL = every(16)


def build(method: Any, parameters: Mapping[str, Any]) -> Pipeline:
    """A pipeline from a name, a stage, a pipeline, or a list of names and stages; parameters go by their names."""
    if isinstance(method, Pipeline):
        return method
    stages = []
    for item in method if isinstance(method, (list, tuple)) else [method]:
        cls = registry(item) if isinstance(item, str) else None
        own = {p.name: p.field for p in cls.parameters()} if cls else {}
        stages.append(cls(**{f: parameters[n] for n, f in own.items() if n in parameters}) if cls else item)
    return Pipeline(tuple(stages))


def sites(
    models: Mapping[str, Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    stats: Stats | None = None,
    seed: int = 0,
) -> dict[str, Site]:
    """One site per tensor, not cut.  A statistic is left out where a model lacks it."""
    names = list(next(iter(models.values())))
    depth, kinds = depths(names), list(dict.fromkeys(k for s in (stats or {}).values() for k in s))
    return {
        name: Site(
            key=Key(name, tuple(next(iter(models.values()))[name].shape), "float32"),
            stack=torch.stack([m[name] for m in models.values()]),
            base=None if base is None else base[name],
            names=tuple(models),
            depth=depth.get(name),
            stats={
                k: tuple((stats or {})[m][k][name] for m in models)
                for k in kinds
                if all(name in (stats or {})[m].get(k, {}) for m in models)
            },
            seed=seed,
        )
        for name in names
    }


def block(site: Site, low: int, high: int) -> Site:
    """Rows low .. high of a site."""
    if not site.key.shape:
        return site
    stats = {k: tuple(t[low:high] if t.shape == site.key.shape else t for t in ts) for k, ts in site.stats.items()}
    base = None if site.base is None else site.base[low:high]
    return replace(site, stack=site.stack[:, low:high].contiguous(), base=base, start=low, stats=stats)


def covered(stage: Stage, site: Site) -> Stage:
    """The stage itself, or what it falls back to on this tensor."""
    low, high = stage.traits.domain or (0, 99)
    missing = [n for n in stage.traits.needs if n != BASE and n not in site.stats]
    if low <= len(site.key.shape) <= high and not missing and not stage.leaves_out(site.key, site.count):
        return stage
    other = stage.elsewhere()
    assert other is not None, f"{stage.name} does not cover {site.key}"
    return other


def _cut(cut: Cut) -> Cut:
    return every(1 << 30) if cut is whole else cut


def run(
    pipeline: Pipeline, sites: Mapping[str, Site], cut: Cut = whole, honour_skips: bool = True
) -> dict[str, Tensor]:
    """Measure, digest and merge every site."""
    own = {n: Pipeline(tuple(covered(s, site) for s in pipeline.stages)) for n, site in sites.items()}
    # A model-wide sum must not depend on `cut`, so `whole` may not mean one block there either.
    cuts = {n: _cut(cut) if own[n].grain is Grain.ELEMENT else whole for n in own}
    summaries: dict[str, dict[int, Summary]] = {n: {} for n in own}
    for index in range(len(pipeline.stages)):
        for round in range(max(p.stages[index].rounds for p in own.values())):
            here = [n for n in own if round < own[n].stages[index].rounds]
            model = [n for n in here if own[n].stages[index].scope is Scope.MODEL]
            for names in [model, *([n] for n in here if n not in model)]:
                if names:
                    _round((index, round), names, sites, own, summaries, cuts, honour_skips)
    return {n: _merge(own[n], sites[n], cuts[n], summaries[n]) for n in own}


def _round(
    step: tuple[int, int],
    names: Sequence[str],
    sites: Mapping[str, Site],
    own: Mapping[str, Pipeline],
    summaries: dict[str, dict[int, Summary]],
    cuts: Mapping[str, Cut],
    honour_skips: bool,
) -> None:
    index, round = step
    totals: dict[str, Tensor] = {}
    stage = own[names[0]].stages[index]
    before = summaries[names[0]].get(index, {})
    if honour_skips and all(stage.skips(sites[n].key, round, before) for n in names):
        return
    for name in names:
        fixed = stage.scope is Scope.MODEL and cuts[name] is not whole
        for low, high in (CANONICAL if fixed else cuts[name])(sites[name].key.rows):
            with torch.no_grad():  # summaries are constants to a gradient
                found = own[name].measure(step, block(sites[name], low, high), summaries[name])
            for key, value in found.items():
                if isinstance(value, Rows):
                    totals[key] = torch.cat([totals[key], value.values], -1) if key in totals else value.values
                else:
                    totals[key] = totals[key] + value if key in totals else value
    digest = stage.digest(totals, round, before)
    for name in names:
        summaries[name][index] = digest


def _merge(pipeline: Pipeline, site: Site, cut: Cut, summaries: Mapping[int, Summary]) -> Tensor:
    if not site.key.shape:
        return pipeline.merge(site, summaries)
    return torch.cat([pipeline.merge(block(site, low, high), summaries) for low, high in cut(site.key.rows)])


def merge(
    models: Mapping[str, Mapping[str, Tensor]],
    method: Any,
    base: Mapping[str, Tensor] | None = None,
    *,
    stats: Stats | None = None,
    seed: int = 0,
    dtype: str | None = None,
    cut: Cut = whole,
    **parameters: Any,
) -> dict[str, Tensor]:
    """The signature of `weightsmith.merge`, for tensors in memory."""
    widened = {n: {k: t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for k, t in m.items()}
               for n, m in models.items()}  # fmt: skip
    ground = None if base is None else {k: t.float() if t.dtype != torch.float64 else t for k, t in base.items()}
    out = run(build(method, parameters), sites(widened, ground, stats, seed), cut)
    first = next(iter(models.values())) if base is None else base
    return {n: t.to(getattr(torch, dtype) if dtype else first[n].dtype) for n, t in out.items()}


def delta(method: Any, *changes: Tensor, **parameters: Any) -> Tensor:
    """What a method makes of task vectors: the experts' changes of one tensor, on a base of zeros."""
    base = {"w": torch.zeros_like(changes[0])}
    return merge({f"e{i}": {"w": c} for i, c in enumerate(changes)}, method, base=base, **parameters)["w"]
