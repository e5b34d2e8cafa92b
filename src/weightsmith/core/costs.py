"""What a stage takes of memory and processor, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Costs"]


@dataclass(frozen=True)
class Costs:
    """Memory and time of one stage, beside its inputs and its result.

    Bytes per byte of float32:

    scratch     peak of what it makes, for each input (experts and base)
    matrix      and once, however many inputs there are
    square      and of a square matrix of its `side`: smaller, rows, columns, or units (of a group)
    solves      copies made at once, in float64, of a statistic with a shape of its own
    joint       it holds the coordinates of low-rank experts in the space of all

    Bytes:

    histograms  of half a megabyte, counted for each expert in a measuring pass (`ops.select`, `ops.order`)
    pairs       a measuring pass finds a float64 number per row for each pair of models (`ops.gram`)
    imports     of a process, for libraries which no other stage loads

    Time:

    seconds     of one core per 10^9 parameters and expert; None: not known, and a plan with it gives no time
    cubic       they grow with the smaller side of a matrix and are given for 768
    """

    scratch: float = 0.0
    matrix: float = 0.0
    square: float = 0.0
    side: str = "smaller"
    solves: float = 0.0
    joint: bool = False
    histograms: int = 0
    pairs: bool = False
    imports: int = 0
    seconds: float | None = None
    cubic: bool = False
