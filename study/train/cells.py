"""Figures that are measured once and kept, and tables of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

__all__ = ["Figures", "Room", "searched", "table"]

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Room:
    """Where a study finds its data and keeps what it made: models in folders, figures in one JSON file each.

    short  a run that only shows that everything works: a few steps, figures without a meaning
    """

    data: Path
    home: Path
    short: bool = False

    def steps(self, count: int) -> int:
        return 2 if self.short else count

    def figures(self, name: str, measure: Callable[[], Figures]) -> Figures:
        """Those of a cell; measured where they are not kept yet, with the seconds that it took."""
        file = self.home / f"{name}.json"
        if not file.is_file():
            began = time.process_time()
            found = {**measure(), "seconds": time.process_time() - began}
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(found), "utf-8")
            partial.replace(file)
        return json.loads(file.read_text("utf-8"))

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """A folder that `make` fills; made where it is not there yet."""
        place = self.home / name
        if not place.is_dir():
            partial = place.with_name(f"{place.name}.partial")
            partial.mkdir(parents=True, exist_ok=True)
            make(partial)
            partial.rename(place)
        return place


def searched(
    room: Room,
    name: str,
    rates: Sequence[float],
    measure: Callable[[float, int], Figures],
    seeds: Sequence[int],
    by: str,
) -> list[Figures]:
    """The figures of every seed at the rate that is best on the first one: the least of the figure `by`."""

    def cell(rate: float, seed: int) -> Figures:
        return room.figures(f"{name}-{rate}-{seed}", lambda: measure(rate, seed))

    rates = rates[:1] if room.short else rates
    best = min(rates, key=lambda rate: cell(rate, seeds[0])[by])
    return [cell(best, seed) for seed in seeds[: room.steps(len(seeds))]]


def table(title: str, rows: Mapping[str, Sequence[Figures]], columns: Sequence[str], form: str = "{:.3f}") -> str:
    """A table in Markdown: means over seeds, with their spread in brackets where there are several."""

    def cell(values: Sequence[float]) -> str:
        spread = f" ({form.format(stdev(values))})" if len(values) > 1 else ""
        return form.format(mean(values)) + spread

    lines = [f"| {title} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for name, seeds in rows.items():
        lines.append(f"| {name} | {' | '.join(cell([seed[c] for seed in seeds]) for c in columns)} |")
    return "\n".join(lines)
