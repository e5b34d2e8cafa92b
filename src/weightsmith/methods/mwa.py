"""Checkpoints of one run, averaged by their loss, score or step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from weightsmith.core.checks import Case, Verdict, refuse, remark
from weightsmith.core.kernel import WeightedSum
from weightsmith.core.keys import Key
from weightsmith.core.method import Stage, choice, number
from weightsmith.ops.combine import Summed

__all__ = ["Mwa"]


@dataclass(frozen=True)
class Mwa(Summed, name="mwa"):
    """Average the checkpoints of one run by their loss, score or step.

    Result: sum_c u_c x_c / sum_c u_c over checkpoints x_c with metric m_c and penalty p.

    power    u = (min m / m)^p for a loss, (m / max m)^p for steps and scores
    softmax  u = exp(-p d / (max m - min m)), d the distance from the best; all equal: 1
    rank     u = r^p, r = 1 for the worst .. C for the best; equal metrics share the mean rank

    p = 0 is the plain mean, a large p the best checkpoint.  The weights do not change when all metrics are multiplied
    by one number.  The paper's formula in print could not be compared: it has weights from loss or steps and one
    penalty factor, as here.  Full checkpoints, or adapters of one run and one initialisation.

    value   log: from each checkpoint's trainer_state.json, or its run's; steps from its name, checkpoint-N
    source  the training loss or eval_loss, of the log's last entry up to the checkpoint's step
    smooth  since: the mean of the entries since the checkpoint before in its place; single training losses are noisy
    """

    paper = "Metrics-Weighted Averaging (Yu and Choi, 2025), arXiv:2504.18580"

    value: Any = number("log", "loss, score or step of each checkpoint; log: what the trainer logged", options=("log",),
                        each=True)  # fmt: skip
    metric: str = choice("loss", "what the values are; of a loss the lowest is best", "loss", "steps", "score")
    penalty: float = number(1.0, "how strongly the better ones are preferred (0 not at all)", low=0)
    rule: str = choice("power", "from values to weights", "power", "softmax", "rank")
    source: str = choice("train", "which logged loss", "train", "eval")
    smooth: str = choice("nearest", "the last logged loss, or the mean since the checkpoint before", "nearest", "since")

    def check(self, case: Case) -> Iterable[Verdict]:
        values = self._values(case.count)
        if "log" in values:
            missing = self._reads and self.metric == "score"
            return refuse("a score is not in the log; give each model's value" if missing else None)
        low = min(values)
        # (best / v)^penalty: no division by 0, no power of a negative number.
        if self.rule == "power" and self.penalty and (low < 0 or (low == 0 and self.metric == "loss")):
            wanted = "above 0" if self.metric == "loss" else "of at least 0"
            which = f"{low:g} (model {values.index(low) + 1} of {case.count})"
            return refuse(f"rule power needs values {wanted}, not {which}; use rule softmax or rank")
        if len(values) != case.count:
            return ()
        weights = self._weights(values)
        return remark(f"weights {', '.join(f'{w / sum(weights):.4g}' for w in weights)}")

    def informed(self, key: Key, notes: Mapping[str, Mapping[str, Any]]) -> Stage:
        """With the values that are in the log; equal ones where there is no penalty and so no need of them."""
        if not self._reads or self.metric == "score":
            return self
        what = "steps" if self.metric == "steps" else "eval_loss" if self.source == "eval" else "loss"
        kind = f"{what} since" if self.smooth == "since" and what != "steps" else what
        # One per expert; a log is read only if its value is asked for.
        readers = notes["logged"][kind]
        values = self._values(len(readers))
        if len(values) != len(readers):
            return self
        found = tuple(read() if value == "log" else value for read, value in zip(readers, values, strict=True))
        return replace(self, value=found)

    def fused(self, count: int) -> WeightedSum:
        weights = self._weights(self._values(count))
        # Divided after the sum; the weights themselves have 1 for the best.
        return WeightedSum(weights, divisor=sum(weights))

    @property
    def _reads(self) -> bool:
        """Whether the log is needed."""
        return self.penalty > 0 and "log" in self._values(1)

    def _values(self, count: int) -> tuple[Any, ...]:
        return self.value if isinstance(self.value, tuple) else (self.value,) * count

    def _weights(self, values: tuple[Any, ...]) -> tuple[float, ...]:
        """u_c, 1 for the best."""
        if self.penalty == 0 or "log" in values:
            return (1.0,) * len(values)
        best, worst = min(values), max(values)
        if self.metric != "loss":
            best, worst = worst, best
        if best == worst:
            return (1.0,) * len(values)
        if self.rule == "softmax":
            # Relative to the span of the values, so that the penalty has no unit.
            return tuple(math.exp(-self.penalty * (v - best) / (worst - best)) for v in values)
        if self.rule == "rank":
            ordered = sorted(values, reverse=self.metric == "loss")
            # Equals share the mean of their ranks, from 1 for the worst.
            ranks = [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]
            return tuple((rank / max(ranks)) ** self.penalty for rank in ranks)
        return tuple((best / v if self.metric == "loss" else v / best) ** self.penalty for v in values)
