"""Embedding models by kinds of task, as MTEB groups them (self positioning: arXiv:2410.15035)."""

from __future__ import annotations

from weightsmith.study.suite import Method, Rule, Suite, fixed

SUITE = Suite(
    name="embedding",
    title="General text embeddings",
    source="Li et al., 2024, arXiv:2410.15035; MTEB, arXiv:2210.07316",
    about="Experts that were each trained for one kind of task (retrieval, sts, classification, clustering), merged "
    "into one general embedding model.",
    rule=Rule(
        "Tasks of one kind are averaged; each mean is divided by that of the best expert, and the kinds are averaged. "
        "The plain mean over the kinds is the column `mean`.",
        against="best",
    ),
    domains=("retrieval", "sts", "classification", "clustering", "reranking", "pair classification", "summarization"),
    methods={
        "average": Method(fixed(("linear", {}))),
        "task arithmetic": Method(
            fixed(("task_arithmetic", {"lambda": 0.5})),
            fixed(("task_arithmetic", {"lambda": [0.2, 0.4, 0.6, 0.8, 1.0]})),
        ),
        "TIES": Method(
            fixed(("ties", {"density": 0.2})), fixed(("ties", {"density": [0.2, 0.5], "lambda": [0.5, 1.0]}))
        ),
        "SLERP": Method(fixed(("multislerp", {})), note="several models: weighted directions on the sphere"),
        "TSV-M": Method(fixed(("tsvm", {})), fixed(("tsvm", {"scaling": [0.5, 1.0, 1.5]}))),
    },
    notes=(
        "Self positioning itself learns its coefficients: weightsmith tune, then name the result in `checkpoints`.",
    ),
)
