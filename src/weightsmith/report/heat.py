"""The heat map that studies of merging end with: every model on every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightsmith.report.figures import BOTH, Heat

__all__ = ["heat_map"]


def heat_map(
    title: str,
    models: Sequence[tuple[str, Mapping[str, float]]],
    base: Mapping[str, float],
    experts: Mapping[str, float],
    *,
    decimals: int,
) -> Heat:
    """Scores written in, coloured by the share of the expert's gain, (model - base) / (expert - base).

    models   (name, task -> score), from the first line to the last
    experts  task -> score of its own expert; a task that its expert gains nothing on stays without a colour
    """
    tasks = list(experts)
    share = [
        [None if experts[t] == base[t] else 100 * (own[t] - base[t]) / (experts[t] - base[t]) for t in tasks]
        for _, own in models
    ]
    texts = [[f"{own[t]:.{decimals}f}" for t in tasks] for _, own in models]
    about = [
        [
            f"{name} on {task}: {text}" + ("" if kept is None else f", {kept:.0f}% of the expert's gain")
            for task, text, kept in zip(tasks, row, kepts, strict=True)
        ]
        for (name, _), row, kepts in zip(models, texts, share, strict=True)
    ]
    return Heat(
        title,
        [name for name, _ in models],
        tasks,
        share,
        texts,
        BOTH,
        (-100, 100),
        "% of that task's expert's gain; 0 is the base",
        about=about,
    )
