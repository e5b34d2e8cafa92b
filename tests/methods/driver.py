"""Merging in memory, as the method contract says, in a few lines: what the engine must be equal to.

Blocks may be cut at any row.  Model-wide passes add up over blocks of a fixed number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.checks import Case, Level
from weightsmith.core.keys import Key, depths
from weightsmith.core.method import BASE, Grain, Pipeline, Scope, Stage, registry
from weightsmith.core.pass_ import Pass, State, fold
from weightsmith.core.site import Site
from weightsmith.ops.select import Cut as Cuts

Cut = Callable[[int], Sequence[tuple[int, int]]]
Stats = Mapping[str, Mapping[str, Mapping[str, Tensor]]]


def whole(rows: int) -> list[tuple[int, int]]:
    return [(0, rows)]


def every(step: int) -> Cut:
    """Blocks of `step` rows."""
    return lambda rows: [(low, min(low + step, rows)) for low in range(0, max(rows, 1), step)]


CANONICAL = every(16)


@dataclass(frozen=True)
class Given(Cuts):
    """Cuts at given places."""

    given: tuple[tuple[int, ...], ...] = ()

    def ranks(self, total: int) -> Sequence[Sequence[int]]:
        return self.given


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
    missing = [n for n in stage.traits.needs if n != BASE and n not in site.stats]
    verdicts = stage.verdicts(Case(site.count, site.base is not None, site.key))
    if not missing and not any(verdict.level is Level.LEAVE for verdict in verdicts):
        return stage
    other = stage.elsewhere()
    assert other is not None, f"{stage.name} does not cover {site.key}"
    return other


def _cut(cut: Cut) -> Cut:
    return every(1 << 30) if cut is whole else cut


def run(
    pipeline: Pipeline, sites: Mapping[str, Site], cut: Cut = whole, opened: Callable[[Stage], Stage] = lambda s: s
) -> dict[str, Tensor]:
    """Measure and merge every site; opened: what becomes of a stage last."""
    own = {n: Pipeline(tuple(opened(covered(s, site)) for s in pipeline.stages)) for n, site in sites.items()}
    # A model-wide sum must not depend on `cut`, so `whole` may not mean one block there either.
    cuts = {n: _cut(cut) if own[n].grain is Grain.ELEMENT else whole for n in own}
    found: dict[str, dict[int, dict[Pass[Any], Any]]] = {n: {} for n in own}
    for index in range(len(pipeline.stages)):
        passes = {n: p.stages[index].passes(sites[n].count) for n, p in own.items()}
        for place in range(max(map(len, passes.values()))):
            here = {n: p[place] for n, p in passes.items() if place < len(p) and p[place].applies(sites[n].key)}
            model = {n: one for n, one in here.items() if one.scope is Scope.MODEL}
            for asked in [model, *({n: one} for n, one in here.items() if n not in model)]:
                _measure(index, asked, sites, own, found, cuts)
    return {n: _merge(own[n], sites[n], cuts[n], found[n]) for n in own}


def _measure(
    index: int,
    asked: Mapping[str, Pass[Any]],
    sites: Mapping[str, Site],
    own: Mapping[str, Pipeline],
    found: dict[str, dict[int, dict[Pass[Any], Any]]],
    cuts: Mapping[str, Cut],
) -> None:
    """Take all looks of tensors' passes together."""
    looks = dict(asked)
    while looks:
        total, again = fold(_seen(index, looks, sites, own, found, cuts)), {}
        for name, look in looks.items():
            result = look.end(total)
            if isinstance(result, Pass):
                again[name] = result
            else:
                found[name].setdefault(index, {})[asked[name]] = result
        looks = again


def _seen(
    index: int,
    looks: Mapping[str, Pass[Any]],
    sites: Mapping[str, Site],
    own: Mapping[str, Pipeline],
    found: Mapping[str, Mapping[int, Any]],
    cuts: Mapping[str, Cut],
) -> Iterator[State]:
    """What a look at every block gives, one by one."""
    for name, look in looks.items():
        fixed = look.scope is Scope.MODEL and cuts[name] is not whole
        for low, high in (CANONICAL if fixed else cuts[name])(sites[name].key.rows):
            with torch.no_grad():  # what is measured is a constant to a gradient
                yield look.see(own[name].site_for(index, block(sites[name], low, high), found[name]))


def _merge(pipeline: Pipeline, site: Site, cut: Cut, found: Mapping[int, Any]) -> Tensor:
    if not site.key.shape:
        return pipeline.merge(site, found)
    return torch.cat([pipeline.merge(block(site, low, high), found) for low, high in cut(site.key.rows)])


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
