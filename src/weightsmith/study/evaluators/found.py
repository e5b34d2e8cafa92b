"""What an evaluator found out about one task, as plain JSON values."""

from __future__ import annotations

import math
import numbers
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsmith.core.errors import NumericError, RecipeError, did_you_mean

__all__ = ["Found", "of_examples"]


@dataclass(frozen=True)
class Found:
    """Everything that was measured on one task.

    metrics   key -> value;  errors: key -> standard error;  examples: key -> value of each example, in file order
    notes     counts that the reader should know: truncated prompts, answers without a number
    """

    metrics: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    examples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)

    def score(self, metric: str, where: str) -> float:
        """The value of a metric; RecipeError if there is none of that key, NumericError if it is no number."""
        if metric not in self.metrics:
            known = ", ".join(self.metrics) or "nothing"
            raise RecipeError(
                f"{where}: unknown metric {metric!r}{did_you_mean(metric, self.metrics)}; it was given: {known}"
            )
        value: Any = self.metrics[metric]
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise NumericError(f"{where}: {metric} is {value!r}, not a finite number")
        return float(value)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "metrics": dict(self.metrics),
            "errors": dict(self.errors),
            "examples": {key: list(values) for key, values in self.examples.items()},
            "notes": dict(self.notes),
        }

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Found:
        return cls(plain["metrics"], plain["errors"], plain["examples"], plain["notes"])


def of_examples(
    examples: Mapping[str, Sequence[float]], notes: Mapping[str, float] | None = None, **more: float
) -> Found:
    """Means of examples with their standard errors; `more` are metrics that are no means."""
    metrics = {key: statistics.fmean(values) for key, values in examples.items()}
    errors = {key: statistics.stdev(values) / len(values) ** 0.5 for key, values in examples.items() if len(values) > 1}
    return Found({**metrics, **more}, errors, examples, notes or {})
