"""The scale study: does size, base, number of experts or method matter for merging? (arXiv:2410.03617)"""

from __future__ import annotations

from weightsmith.study.suite import Method, Rule, Suite, fixed

SUITE = Suite(
    name="scale",
    title="What matters for merging at scale",
    source="Yadav et al., 2024, arXiv:2410.03617",
    about="Bases of several sizes and kinds (weak, strong), the same experts' tasks for each. The same random subsets "
    "of tasks are merged for every size, base and method, so that cells can be compared in pairs.",
    rule=Rule(
        "Held-in: the score of the merged model divided by that of the task's expert, averaged over the tasks of the "
        "merged experts. Held-out: the score divided by the base's, averaged over all held-out tasks. Where the "
        "divisor is below 1e-6, or the base is at chance, the difference is given instead, and marked."
    ),
    methods={
        "average": Method(fixed(("linear", {}))),
        "task arithmetic": Method(
            fixed(("task_arithmetic", {"lambda": 0.4})),
            fixed(("task_arithmetic", {"lambda": [0.2, 0.3, 0.4, 0.5, 0.7, 1.0]})),
        ),
        "DARE-TIES": Method(
            fixed(("dare", {"density": 0.5}), ("ties", {"density": 1.0})),
            fixed(("dare", {"density": [0.2, 0.5, 0.8]}), ("ties", {"density": 1.0})),
        ),
        "TIES": Method(
            fixed(("ties", {"density": 0.2, "lambda": 1.0})),
            fixed(("ties", {"density": [0.1, 0.2], "lambda": [0.5, 1.0]})),
        ),
    },
    design="scale",
    counts=(2, 4, 6, 8),
    notes=("The number of subsets per cell (3) is from memory of the paper.",),
)
