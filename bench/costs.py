"""python -m bench.costs [--write] [NAME ...] : measure what stages take, against the table that plans predict from.

Memory is the peak of a forked process that merges one matrix (tests/run/peaks.py, so tests/ must be on the path), on
several shapes and numbers of experts, against the plan's prediction; and the bytes of all tensors that a merge makes,
which tell more where blocks are small (tests/test_conformance.py, without codecs and groups).  Time is `bench.methods`.
A row of the table (`src/weightsmith/plan/costs.json`) that agrees stays as it is: measurements move by some percent,
and the table is not to move with them.  `--write` replaces what does not agree.

The table's seconds are those of one machine (docs/benchmarks.md).  How much faster this one is, the median over all
stages that are measured, is taken out before times are compared.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from scipy.optimize import lsq_linear

from bench.methods import case, least
from bench.table import markdown
from run.peaks import STATISTICS, count_for, models, peak_of, stage_of, stages_for, warm_up
from test_conformance import STAGES, bytes_made
from weightsmith.core.costs import Costs
from weightsmith.core.method import Filter, Grain, MergedFilter, registered
from weightsmith.plan import peak
from weightsmith.plan.costs import TABLE, table

__all__ = ["Agreement", "fitted", "main", "measured"]

SHAPES = ((1024, 1024, 2), (1024, 1024, 6), (512, 2048, 3), (2048, 512, 3))
"""Rows, columns, experts: what grows with the stack, with one matrix and with a square is told apart by these."""

LEAST, MOST = 1 / 1.1, 1.35
"""Bounds of predicted / measured: memory that was promised must suffice; what is promised in vain costs threads."""

FACTOR = 1.5
"""How far two measurements of time on a shared machine may be apart."""


@dataclass(frozen=True)
class Agreement:
    """One stage: predicted / measured peaks of processes, its seconds, and the bytes of its own that were measured.

    features  bytes of the stack, of a matrix and of a square: of every process, then of every merge whose tensors were
              counted
    """

    ratios: Sequence[float]
    features: Sequence[tuple[float, float, float]]
    needed: Sequence[float]
    seconds: float
    blocks: bool = False  # it works on blocks

    def fits(self, costs: Costs) -> bool:
        """Whether predictions are near, and enough for the tensors that were counted one by one."""
        counted = zip(self.features[len(self.ratios) :], self.needed[len(self.ratios) :], strict=True)
        own = (costs.scratch, costs.matrix, costs.square)
        enough = all(sum(a * b for a, b in zip(own, sizes, strict=True)) >= needed for sizes, needed in counted)
        return enough and all(LEAST <= ratio <= MOST for ratio in self.ratios)


def measured(names: Sequence[str], side: int, repeat: int) -> dict[str, Agreement]:
    """Every stage on all shapes."""
    ratios: dict[str, list[float]] = {name: [] for name in names}
    features: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    needed: dict[str, list[float]] = {name: [] for name in names}
    warm_up()
    for rows, columns, experts in SHAPES:
        with tempfile.TemporaryDirectory() as name_of_folder:
            folder = Path(name_of_folder)
            models(folder, rows, columns, experts, stats=STATISTICS)
            for name in names:
                count, stages = count_for(name, experts), stages_for(name)
                found = peak_of(folder, stages, count)
                own = _planned(folder, name, count, row(name)) - _planned(folder, name, count, nothing(name))
                squares = {"smaller": min(rows, columns), "rows": rows, "columns": columns, "units": rows}
                unit = 4 * rows * columns
                ratios[name].append(found.ratio)
                features[name].append(((count + 1) * unit, unit, 4 * squares[row(name).side] ** 2))
                needed[name].append(found.measured - (found.predicted - own))
    for name in names:
        for sizes, made in _counted(name):
            features[name].append(sizes)
            needed[name].append(made)
    seconds = {name: _seconds(name, side, repeat) for name in names}
    return {
        name: Agreement(ratios[name], features[name], needed[name], seconds[name], name in STAGES and _in_blocks(name))
        for name in names
    }


def _in_blocks(name: str) -> bool:
    return stage_of(name).grain is Grain.ELEMENT


def row(name: str) -> Costs:
    """What the table has; for a new stage nothing, and a time that grows with the side if it works on whole tensors."""
    return table().get(name) or Costs(cubic=registered()[name].grain is Grain.TENSOR)


def nothing(name: str) -> Costs:
    """The costs of a stage that makes nothing of its own."""
    return replace(row(name), scratch=0.0, matrix=0.0, square=0.0)


def _planned(folder: Path, name: str, count: int, costs: Costs) -> int:
    """The predicted peak if these were the costs of the stage."""
    known = peak.costs_of
    with (
        patch.object(peak, "costs_of", lambda stage: costs if stage.traits.name == name else known(stage)),
        patch("run.peaks._run"),
    ):
        return peak_of(folder, stages_for(name), count, fork=False).predicted


def _counted(name: str, side: int = 512) -> Iterator[tuple[tuple[float, float, float], float]]:
    """Sizes, and the bytes of tensors that a stage makes of them; nothing of codecs and groups."""
    if name not in STAGES:
        return
    stage, unit = stage_of(name), 4.0 * side * side
    for wanted in (1, 3):
        count, made = bytes_made(stage, wanted, side)
        handed_on = 1 if isinstance(stage, MergedFilter) else (count + 1) * isinstance(stage, Filter)
        yield ((count + 1) * unit, unit, unit), made - handed_on * unit


def _seconds(name: str, side: int, repeat: int) -> float:
    """Processor seconds per 10^9 parameters and expert."""
    torch.set_num_threads(1)
    case(registered()[name], 16, 4).planned()()  # kernels are loaded once
    one = case(registered()[name], side, 4)
    return least(one.planned(), repeat) / one.unit


def fitted(costs: Costs, found: Agreement) -> Costs:
    """The least non-negative scratch, matrix and square that cover what was measured.

    A stage that works on blocks makes no squares, and of a process its blocks are a small part.
    """
    first = len(found.ratios) if found.blocks else 0
    known, wanted = np.array(found.features[first:]), np.array(found.needed[first:])
    if found.blocks:
        known = known[:, :2]
    scale = known.max(0)
    shares = lsq_linear(known / scale, np.maximum(wanted, 0.0), bounds=(0, np.inf)).x
    covered = np.maximum((known / scale) @ shares, 1.0)
    shares *= max(1.0, float(np.max(wanted / covered)))
    scratch, matrix, square = (float(np.ceil(10 * value - 1e-6) / 10) for value in (*shares / scale, 0.0)[:3])
    return replace(costs, scratch=scratch, matrix=matrix, square=square)


def revised(costs: Costs, found: Agreement, speed: float) -> Costs:
    """The row of the table after a measurement.  speed: seconds of the table per second here."""
    costs = costs if found.fits(costs) else fitted(costs, found)
    seconds = found.seconds * speed
    if costs.seconds and 1 / FACTOR <= seconds / costs.seconds <= FACTOR:
        return costs
    return replace(costs, seconds=float(f"{seconds:.2g}"))


def write(rows: Mapping[str, Costs]) -> None:
    """One line per stage; what is 0 is left out."""
    nothing = asdict(Costs())
    lines = [
        f"  {json.dumps(name)}: {json.dumps({k: v for k, v in asdict(costs).items() if v != nothing[k]})}"
        for name, costs in sorted(rows.items())
    ]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.costs")
    parser.add_argument("names", nargs="*", help="methods, filters and codecs; all if none is given")
    parser.add_argument("--side", type=int, default=768, help="of the matrices whose time is measured")
    parser.add_argument("--repeat", type=int, default=2, help="rounds; the quickest counts")
    parser.add_argument("--write", action="store_true", help="replace the rows that do not agree")
    options = parser.parse_args(arguments)
    names = options.names or sorted(registered().keys() - {"keep"})
    rows = [["stage", "predicted / measured memory", "seconds", "in the table", "agrees"]]
    new = dict(table())
    agreements = measured(names, options.side, options.repeat)
    speeds = [seconds / one.seconds for name, one in agreements.items() if (seconds := row(name).seconds)]
    speed = median(speeds or [1.0])  # of a new stage alone: measure some others with it
    for name, found in agreements.items():
        costs = row(name)
        new[name] = revised(costs, found, speed)
        memory = f"{min(found.ratios):.2f} to {max(found.ratios):.2f}"
        rows.append(
            [
                name,
                memory,
                f"{found.seconds * speed:.2g}",
                f"{costs.seconds or 0:g}",
                "yes" if new[name] == costs else "no",
            ]
        )
    print(markdown(rows))
    if options.write:
        write(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
