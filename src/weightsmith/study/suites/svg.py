"""SVG as a domain: editing, understanding and making pictures that are text (review: arXiv:2503.04983)."""

from __future__ import annotations

from weightsmith.study.suite import Method, Rule, Suite, Task, fixed

SUITE = Suite(
    name="svg",
    title="SVG",
    source="Malashenko et al., 2025, arXiv:2503.04983; tasks after SVGEditBench, VGBench and SGP-Bench",
    about="Pictures as text, scored offline: seeded scenes of 1 to 8 shapes, whose answers are known because a program "
    "made them. No data are needed.",
    rule=Rule(
        "Editing: 1 - the mean squared error of the rendered answer (a picture that cannot be read or drawn counts as "
        "error 1). Understanding: accuracy. Generation: share of the caption's words that the picture keeps. Each is "
        "divided by the best expert's, and the three are averaged.",
        against="best",
    ),
    tasks=(
        Task("edit", "one_minus_mse", "editing", harness="six operations, 72 px"),
        Task("understand", "likelihood_acc", "understanding", chance=0.25),
        Task("generate", "rules", "generation", harness="colours, kinds and numbers of the caption"),
    ),
    methods={
        "average": Method(fixed(("linear", {}))),
        "task arithmetic": Method(fixed(("task_arithmetic", {"lambda": 0.5}))),
        "TIES": Method(fixed(("ties", {"density": 0.2}))),
        "TSV-M": Method(fixed(("tsvm", {}))),
    },
    notes=("Likeness to the caption by CLIP, and FID, are not measured: captions are checked word by word.",),
)
