"""The ratios of a run as one picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench.measure import Usage
from bench.series import COPY, OURS, THEIRS, Run
from bench.table import figures, ratio
from weightsmith.report.picture import Bar, Panel, bars

__all__ = ["plot"]

_Figure = Callable[[Usage], float]
_FIGURES: Mapping[str, _Figure] = {
    "wall time": lambda u: u.wall,
    "processor time": lambda u: u.cpu,
    "peak memory": lambda u: u.rss,
}
CAPTION = "Shares of what mergekit 0.1.5 takes for the same merge of the same files; grey: a plain copy of the files."


def plot(runs: Sequence[Run]) -> str:
    """SVG: what weightsmith and the copy take of mergekit's wall time, processor time and memory, merge by merge."""
    merges = list(dict.fromkeys(run.merge for run in runs))
    panels = []
    for title, of in _FIGURES.items():
        found = []
        for merge in merges:
            found.append(Bar(merge.replace("_", " "), _share(runs, merge, OURS, of)))
            found.append(Bar("copy", _share(runs, merge, COPY, of), other=True))
        panels.append(Panel(title, found))
    return bars(panels, CAPTION, width=1100)


def _share(runs: Sequence[Run], merge: str, program: str, of: _Figure) -> float:
    return ratio(figures(runs, merge, program, of), figures(runs, merge, THEIRS, of)).median
