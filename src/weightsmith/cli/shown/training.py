"""What the verbs of `weightsmith train` print alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from weightsmith.cli.show import table

__all__ = ["curve"]


def curve(rows: Iterable[Any]) -> None:
    """A table of a run's rows: step, loss, loss of validation, norm of the gradient."""
    told = [tuple("" if v is None else f"{v:.4g}" for v in (r.step, r.loss, r.valid, r.gradient)) for r in rows]
    table("Curve", ["step", "training", "validation", "gradient"], told, right=(0, 1, 2, 3))
