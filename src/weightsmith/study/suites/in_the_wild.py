"""Random subsets of public fine-tunes: how often is a merge better than its base, and than its best part?"""

from __future__ import annotations

from weightsmith.study.suite import Method, Rule, Suite, fixed

SUITE = Suite(
    name="in_the_wild",
    title="Merging in the wild",
    source="arXiv:2511.21437 (twelve public fine-tunes of a base, random subsets of 2 to 12, sixteen benchmarks)",
    about="A pool of checkpoints of one base that nobody trained for being merged. Random subsets are merged, with one "
    "setting per method.",
    rule=Rule(
        "The mean score over all tasks. Counted is the share of merges above the base, and above the best checkpoint "
        "of the subset, each with Wilson's 95% interval.",
        against="base",
    ),
    methods={
        "task arithmetic": Method(fixed(("task_arithmetic", {"lambda": "auto"}))),
        "TIES": Method(fixed(("ties", {"density": 0.2}))),
        "model stock": Method(fixed(("model_stock", {}))),
        "TSV-M": Method(fixed(("tsvm", {}))),
        "Iso-C": Method(fixed(("iso_c", {}))),
    },
    design="wild",
    counts=tuple(range(2, 13)),
    notes=(
        "Subsets of one pool share checkpoints, so that the intervals are rather too narrow.",
        "The paper's sixth method, Subspace Boosting, is not made here.",
        "The paper's coefficients were not verified: task arithmetic takes lambda: auto, the others their defaults.",
    ),
)
