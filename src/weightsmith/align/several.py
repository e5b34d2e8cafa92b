"""Several models onto one: each is matched onto the mean of all others (MergeMany, Git Re-Basin, arXiv:2209.04836)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.align.chosen import matchable
from weightsmith.align.folder import write
from weightsmith.align.many import merge_many
from weightsmith.align.match import STATISTICS, objective, walk
from weightsmith.align.run import Aligned, Settings, entries, moves, opened
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.core.symmetry import permute
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.source import Source
from weightsmith.io.write.output import check_output

__all__ = ["align_all", "matched_all"]


def align_all(
    moving: Mapping[str, Any],
    reference: Any,
    out: str | Path,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Aligned]:
    """Permute the units of all models `moving` so that they and the reference lie as near each other as they can.

    moving  name -> model; the alignment of each is written to a folder of its name in `out`, as `run.align` writes one
    By weights only.  One layer of all models is held at a time where the residual stream stays.
    """
    sources = {name: opened(model) for name, model in moving.items()}
    still, out = opened(reference), Path(out)
    read = [path for source in (still, *sources.values()) for path in source.origin.locations]
    if problems := [problem for name in sources for problem in check_output(out / name, read, overwrite, True, 0)]:
        raise PlanError(problems)
    for source in (still, *sources.values()):
        source.prepare()
    settings = settings or Settings()
    found = matched_all(sources, still, settings, progress)
    for name, one in found.items():
        beside = {"beside": [str(source) for other, source in sources.items() if other != name]}
        write(out / name, one, (sources[name], still), {**asdict(settings), **beside}, overwrite)
    return found


def matched_all(
    moving: Mapping[str, Source],
    reference: Source,
    settings: Settings,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Aligned]:
    """The permutations alone; objective and distance of each are to the reference, which the others lie around.

    Raises RecipeError for what one pair of models can have only: data, widths, singular vectors.
    """
    if settings.by != "weights" or settings.data or settings.spectra or {settings.keep, settings.budget} != {None}:
        raise RecipeError("several models are matched by weights, without data, widths or spectra; align one at a time")
    began = time.perf_counter()
    names = list(moving)
    sources = [packed_like_memory(source) for source in (reference, *moving.values())]
    layouts = [matchable(source, sources[0], settings.freeze) for source in sources[1:]]
    movable = min(layouts, key=lambda layout: len(layout.groups))  # what is frozen for one model stays in all
    orders: list[dict[str, np.ndarray]] = [{} for _ in names]
    totals, squares = np.zeros((len(names), 2)), np.zeros((len(names), 1))
    parts = list(walk(movable.groups))
    for done, groups in enumerate(parts):
        tensors = dict.fromkeys(name for group in groups for name in group.names)
        states = [{name: entries(source, name) for name in tensors} for source in sources]
        _, found = merge_many(
            groups, states, still=(0,), seed=settings.seed, max_iter=settings.max_iter, restarts=settings.restarts,
            normalize=settings.normalize,
        )  # fmt: skip
        counted = [name for name in tensors if name.rpartition(".")[2] not in STATISTICS]
        first = objective(states[0], states[0], counted)
        for i, (state, order) in enumerate(zip(states[1:], found[1:], strict=True)):
            placed = dict(state)
            for group in groups:
                placed |= permute(placed, group, order)
            totals[i] += [objective(states[0], one, counted) for one in (state, placed)]
            squares[i] += first + objective(state, state, counted)
            orders[i] |= order
        if progress:
            progress(done + 1, len(parts))
    seconds = time.perf_counter() - began
    squares = np.maximum(squares - 2 * totals, 0.0)
    return {
        name: Aligned(movable, order, moves(order), float(first), float(then), (float(far), float(near)), {}, seconds)
        for name, order, (first, then), (far, near) in zip(names, orders, totals, np.sqrt(squares), strict=True)
    }
