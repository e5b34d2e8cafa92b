"""MergeBench: five domains, one expert each, and what a merge forgets (arXiv:2505.10833)."""

from __future__ import annotations

from weightsmith.study.suite import LOWER, Method, Rule, Suite, Task, fixed

_TENTHS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
_SHARES = _TENTHS[:-1]
_LANGUAGES = ("fr", "es", "de", "ru")


def _task(name: str, metric: str, domain: str, harness: str, **more: object) -> Task:
    return Task(name, metric, domain, harness=harness, **more)  # type: ignore[arg-type]


_TEST = (
    _task("ifeval", "prompt_level_strict_acc", "instruction", "lm-eval"),
    _task("gsm8k_cot", "flexible_extract", "math", "lm-eval"),
    *(_task(f"m_mmlu_{language}", "acc", "multilingual", "lm-eval", chance=0.25) for language in _LANGUAGES),
    *(_task(f"arc_{language}", "acc_norm", "multilingual", "lm-eval", chance=0.25) for language in _LANGUAGES),
    *(_task(f"hellaswag_{language}", "acc_norm", "multilingual", "lm-eval", chance=0.25) for language in _LANGUAGES),
    _task("humanevalplus", "pass@1", "coding", "bigcode-eval, T=0.2, 10 samples, 512 tokens"),
    _task("mbppplus", "pass@1", "coding", "bigcode-eval, T=0.2, 10 samples, 512 tokens"),
    _task("wildguardtest", "refusal", "safety", "safety-eval"),
    _task("harmbench", "attack_success", "safety", "safety-eval", direction=LOWER),
    _task("do_anything_now", "attack_success", "safety", "safety-eval", direction=LOWER),
    _task("xstest", "over_refusal", "safety", "safety-eval", direction=LOWER),
)
_PROXIES = (
    _task("mmlu_stem", "acc", "math", "lm-eval", role="proxy", chance=0.25),
    _task("lambada_openai", "acc", "multilingual", "lm-eval", role="proxy"),
    _task("conala", "bleu", "coding", "bigcode-eval", role="proxy"),
    _task("wildjailbreak_harmful", "attack_success", "safety", "safety-eval", role="proxy", direction=LOWER),
)
_GUARDS = tuple(
    _task(name, metric, "forgetting", "lm-eval", role="guard")
    for name, metric in (
        ("mmlu", "acc"),
        ("triviaqa", "exact_match"),
        ("squadv2", "f1"),
        ("coqa", "f1"),
        ("pubmedqa", "acc"),
        ("wmt14", "chrf"),
    )
)

SUITE = Suite(
    name="mergebench",
    title="MergeBench",
    source="He et al., NeurIPS 2025 Datasets & Benchmarks, arXiv:2505.10833",
    about="Five experts of one base (instruction, math, multilingual, coding, safety), merged into one model.",
    rule=Rule(
        "A domain's score is the mean of its tasks; rates where lower is better count as 1 - rate. Each is divided by "
        "the score of that domain's expert, and the five shares are averaged."
    ),
    tasks=(*_TEST, *_PROXIES, *_GUARDS),
    domains=("instruction", "math", "multilingual", "coding", "safety", "forgetting"),
    experts=("instruction", "math", "multilingual", "coding", "safety"),
    methods={
        "model soup": Method(fixed(("linear", {})), note="1/5 of each expert"),
        "task arithmetic": Method(
            fixed(("task_arithmetic", {"lambda": 0.4})), fixed(("task_arithmetic", {"lambda": _TENTHS}))
        ),
        "Fisher": Method(fixed(("fisher", {}))),
        "RegMean": Method(fixed(("regmean", {"alpha": 0.5})), fixed(("regmean", {"alpha": _TENTHS}))),
        "TIES": Method(
            fixed(("ties", {"density": 0.3, "lambda": 0.4})), fixed(("ties", {"density": _SHARES, "lambda": _TENTHS}))
        ),
        "DARE": Method(
            fixed(("dare", {"density": 0.1}), ("task_arithmetic", {"lambda": 0.4})),
            fixed(("dare", {"density": _SHARES}), ("task_arithmetic", {"lambda": _TENTHS})),
            note="drops 0.9 of all changes: density 0.1",
        ),
        "Consensus TA": Method(
            fixed(("task_arithmetic", {}), ("consensus", {"lambda": 0.4, "k": 2, "tall_mask_lambda": 0.4})),
            fixed(
                ("task_arithmetic", {}),
                ("consensus", {"lambda": 0.4, "k": 2, "tall_mask_lambda": [0.2, 0.3, 0.4, 0.5, 0.6]}),
            ),
        ),
        "Localize-and-Stitch": Method(
            fixed(("magnitude", {"density": 0.1}), ("ram", {"epsilon": 0.0})),
            fixed(("magnitude", {"density": [0.05, 0.1, 0.2]}), ("ram", {"epsilon": 0.0})),
            note="the data-less form: the largest tenth of every tensor's changes, averaged where experts overlap; "
            "the trained masks of the paper are not made",
        ),
    },
    notes=(
        "The paper's settings are those of its scripts. Its scripts choose on IFEval and test on IFEval: the "
        "instruction domain has no proxy here; name one with role: proxy.",
        "Fisher and RegMean need statistics of every expert (weightsmith observe), and are left out without them.",
    ),
)
