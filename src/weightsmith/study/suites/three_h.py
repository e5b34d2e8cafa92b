"""The 3H benchmark: helpful, honest and harmless, twelve merges beside three mixtures of data (arXiv:2502.06876)."""

from __future__ import annotations

from collections.abc import Sequence

from weightsmith.study.grids import Written
from weightsmith.study.suite import LOWER, Method, Rule, Suite, Task, fixed

_SUM = ("task_arithmetic", {"lambda": 1.0})
_VOTE = ("ties", {"density": 1.0, "lambda": 1.0})


def _rewarded(experts: Sequence[str]) -> Written:
    """Rewarded soup: the average, and averages in which one expert has half of the weight."""
    others = max(len(experts) - 1, 1)
    weights = [{name: 1 / len(experts) for name in experts}]
    weights += [{name: 0.5 if name == first else 0.5 / others for name in experts} for first in experts]
    return (("linear", {"weight": weights}),)


_TASKS = tuple(
    Task(name, metric, domain, harness=harness)
    for name, metric, domain, harness in (
        ("gsm8k", "flexible_extract", "helpful", "math"),
        ("gpqa", "acc", "helpful", "physics"),
        ("mmlu_biology", "acc", "helpful", "biology"),
        ("humaneval", "pass@1", "helpful", "code"),
        ("mbpp", "pass@1", "helpful", "code"),
        ("livecodebench", "pass@1", "helpful", "code"),
        ("halueval", "acc", "honest", "hallucination"),
        ("salad_bench", "safe", "harmless", "safety"),
        ("or_bench_toxic", "refusal", "harmless", "safety"),
    )
)

SUITE = Suite(
    name="three_h",
    title="The 3H benchmark",
    source="arXiv:2502.06876; settings and data sets beyond the abstract are a reconstruction, not verified",
    about="One expert per dimension of annotation (helpful, honest, harmless, helpful and honest, helpful and "
    "harmless) on one instruct model. The three mixtures of data (heuristic, by ArmoRM's scores, by Hummer's) are "
    "checkpoints that you give under `checkpoints`.",
    rule=Rule(
        "The tasks of each of the three groups (helpful, honest, harmless) are averaged. Each mean is divided by the "
        "instruct model's, and the three are averaged: 1 is the instruct model, and what lies above it is the gain.",
        against="base",
    ),
    tasks=(*_TASKS, Task("or_bench_hard", "over_refusal", "harmless", direction=LOWER, harness="over-refusal")),
    domains=("helpful", "honest", "harmless"),
    experts=("helpful", "honest", "harmless", "helpful_honest", "helpful_harmless"),
    checkpoints=("heuristic", "armorm", "hummer"),
    methods={
        "weight average": Method(fixed(("linear", {}))),
        "rewarded soup": Method(
            fixed(("linear", {})), _rewarded, note="one expert with half of the weight; without proxies the average"
        ),
        "model stock": Method(fixed(("model_stock", {}))),
        "task arithmetic": Method(
            fixed(("task_arithmetic", {"lambda": 0.5})),
            fixed(("task_arithmetic", {"lambda": [0.2, 0.3, 0.5, 0.7, 1.0]})),
        ),
        "TIES": Method(fixed(("ties", {"density": 0.5})), fixed(("ties", {"density": [0.2, 0.5, 0.8]}))),
        "DARE": Method(fixed(("dare", {"density": 0.5}), _SUM), fixed(("dare", {"density": [0.2, 0.5, 0.8]}), _SUM)),
        "DARE-TIES": Method(
            fixed(("dare", {"density": 0.5}), _VOTE), fixed(("dare", {"density": [0.2, 0.5, 0.8]}), _VOTE)
        ),
        "DELLA": Method(fixed(("della", {"density": 0.5}), _SUM), fixed(("della", {"density": [0.3, 0.5, 0.7]}), _SUM)),
        "DELLA-TIES": Method(
            fixed(("della", {"density": 0.5}), _VOTE), fixed(("della", {"density": [0.3, 0.5, 0.7]}), _VOTE)
        ),
        "breadcrumbs": Method(
            fixed(("breadcrumbs", {"density": 0.5}), _SUM), fixed(("breadcrumbs", {"density": [0.3, 0.5, 0.9]}), _SUM)
        ),
        "breadcrumbs-TIES": Method(
            fixed(("breadcrumbs", {"density": 0.5}), _VOTE), fixed(("breadcrumbs", {"density": [0.3, 0.5, 0.9]}), _VOTE)
        ),
        "TSVM": Method(fixed(("tsvm", {})), fixed(("tsvm", {"scaling": [0.5, 1.0, 1.5]}))),
    },
    notes=(
        "What stands for each data set, and the merges' settings, are the usual ones: the paper's code is not out.",
    ),
)
