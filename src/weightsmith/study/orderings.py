"""What papers say about which method is better, and what a study measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from weightsmith.study.figures import tau

__all__ = ["PUBLISHED", "Chain", "Pair", "Verdict", "compare"]


@dataclass(frozen=True)
class Chain:
    """Methods from worst to best, as a paper reports them on its own models."""

    source: str
    methods: tuple[str, ...]


_CONSENSUS = "task_arithmetic | consensus"

PUBLISHED = (
    Chain(
        "the field's usual order on 8 image tasks",
        ("average", "task_arithmetic", "ties", _CONSENSUS, "pcb", "doge", "tsvm", "iso_c"),
    ),
    Chain("TIES-Merging, arXiv:2306.01708", ("average", "task_arithmetic", "ties")),
    Chain("Consensus, arXiv:2405.07813", ("average", "task_arithmetic", _CONSENSUS)),
    Chain("PCB-Merging, arXiv:2410.02396", ("task_arithmetic", "ties", "pcb")),
    Chain("DOGE, arXiv:2501.01230", ("task_arithmetic", "ties", "pcb", "doge")),
    Chain("Task Singular Vectors, arXiv:2412.00081", ("average", "task_arithmetic", _CONSENSUS, "tsvm")),
    Chain("Iso-C, arXiv:2502.04959", (_CONSENSUS, "tsvm", "iso_c")),
    Chain("WUDI, arXiv:2503.08099", ("task_arithmetic", "ties", "wudi")),
    Chain("LiNeS, arXiv:2410.17146", ("task_arithmetic", "task_arithmetic | lines")),
    Chain("LiNeS, arXiv:2410.17146", ("ties", "ties | lines")),
    Chain("OPCM, arXiv:2501.09522", ("average", "opcm")),
    Chain("R-TSVM, arXiv:2502.06876", ("tsvm", "r_tsvm")),
    Chain("MergeBench, arXiv:2505.10833", ("fisher", "dare | task_arithmetic", "task_arithmetic", "regmean")),
)
"""Orders only: the figures behind them belong to other models and are not repeated here."""


@dataclass(frozen=True)
class Pair:
    """Two neighbours of a chain: the paper has `better` above `worse`.

    difference  mean of better - worse, in normalised score, over tasks and studies
    error       its standard error over those (paired); None with one value
    """

    worse: str
    better: str
    difference: float
    error: float | None

    @property
    def verdict(self) -> str:
        """'kept', 'broken', or 'too close' where the difference is within two standard errors of zero."""
        if self.difference == 0 or (self.error is not None and abs(self.difference) <= 2 * self.error):
            return "too close"
        return "kept" if self.difference > 0 else "broken"


@dataclass(frozen=True)
class Verdict:
    """A chain against the figures: tau is 1 for the paper's order, -1 for its reverse, over all pairs of the chain."""

    source: str
    methods: tuple[str, ...]  # those that were measured
    measured: tuple[str, ...]  # the same, from worst to best as measured
    tau: float
    pairs: tuple[Pair, ...]


def compare(figures: Mapping[str, Sequence[float]], chains: Sequence[Chain] = PUBLISHED) -> tuple[Verdict, ...]:
    """Hold chains against what was measured.

    figures  method -> its normalised scores, one per task and study, in the same order for all methods
    """
    found = []
    for chain in chains:
        methods = tuple(m for m in chain.methods if figures.get(m))
        if len(methods) < 2:
            continue
        means = {m: statistics.fmean(figures[m]) for m in methods}
        agreement = tau([float(at) for at in range(len(methods))], [means[m] for m in methods])
        assert agreement is not None
        pairs = tuple(_pair(worse, better, figures) for worse, better in pairwise(methods))
        found.append(Verdict(chain.source, methods, tuple(sorted(methods, key=means.__getitem__)), agreement, pairs))
    return tuple(found)


def _pair(worse: str, better: str, figures: Mapping[str, Sequence[float]]) -> Pair:
    differences = [b - a for a, b in zip(figures[worse], figures[better], strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return Pair(worse, better, statistics.fmean(differences), error)
