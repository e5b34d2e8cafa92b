"""The heat map that studies of merging end with: every model on every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightsmith.report.html import Figure

__all__ = ["heat_map"]


def heat_map(
    title: str,
    models: Sequence[tuple[str, Mapping[str, float]]],
    base: Mapping[str, float],
    experts: Mapping[str, float],
    *,
    decimals: int,
    margin: int,
    line: int,
) -> Figure:
    """Scores written in, coloured by the share of the expert's gain, (model - base) / (expert - base).

    models   (name, task -> score), from the lowest line to the highest
    experts  task -> score of its own expert; a task that its expert gains nothing on stays without a colour
    margin   pixels left of the map, for the names; `line`: pixels of a model's line
    """
    tasks = list(experts)
    share = [
        [None if experts[t] == base[t] else 100 * (own[t] - base[t]) / (experts[t] - base[t]) for t in tasks]
        for _, own in models
    ]
    heat = {
        "type": "heatmap",
        "x": tasks,
        "y": [name for name, _ in models],
        "z": share,
        "zmin": -100,
        "zmax": 100,
        "zmid": 0,
        "colorscale": [[0, "rgba(196,87,59,0.75)"], [0.5, "rgba(127,127,127,0.1)"], [1, "rgba(59,130,196,0.75)"]],
        "text": [[f"{own[t]:.{decimals}f}" for t in tasks] for _, own in models],
        "texttemplate": "%{text}",
        "hovertemplate": "%{y} on %{x}: %{text}<br>%{z:.0f}% of the expert's gain<extra></extra>",
        "colorbar": {"title": {"text": "gain kept, %"}, "thickness": 12},
        "xgap": 2,
        "ygap": 2,
    }
    layout = {
        "margin": {"l": margin, "r": 20, "t": 30, "b": 20},
        "xaxis": {"side": "top", "showgrid": False},
        "yaxis": {"showgrid": False},
    }
    note = "Colour: share of that task's expert's gain; grey is the base."
    return Figure(title, [heat], layout, note, height=60 + line * len(models))
