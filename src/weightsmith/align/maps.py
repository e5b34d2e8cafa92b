"""Maps of two coefficients, drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weightsmith.report.figures import BLUE, Heat
from weightsmith.report.html import page

__all__ = ["as_page", "square"]


def square(title: str, grid: np.ndarray, values: np.ndarray, names: Sequence[str], legend: str, note: str = "") -> Heat:
    """values [grid, grid] over two coefficients, the first one's downwards."""
    words = [f"{a:.2g}" for a in grid]
    about = [[f"{names[0]} {a}, {names[1]} {b}: {v:.4g}" for b, v in zip(words, line, strict=True)]
             for a, line in zip(words, values.tolist(), strict=True)]  # fmt: skip
    span = (float(values.min()), max(float(values.max()), float(values.min()) + 1e-9))
    return Heat(title, words, words, values.tolist(), [["" for _ in line] for line in values], BLUE, span, legend,
                note, about)  # fmt: skip


def as_page(title: str, grid: np.ndarray, error: np.ndarray, names: Sequence[str]) -> str:
    """A disentanglement map as an HTML page."""
    note = f"Rows: coefficient of {names[0]}; columns: of {names[1]}.  0 where answers are those of one alone."
    return page(title, [square("Disentanglement error", grid, error, names, "share of answers that change", note)])
