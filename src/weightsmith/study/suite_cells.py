"""Designs with subsets: the same random subsets of experts for every base, size and method, a cell each."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError, some
from weightsmith.io.read.peft import adapter_in
from weightsmith.study.evaluators.measure import in_memory
from weightsmith.study.findings import Finding, findings, shares
from weightsmith.study.grids import Candidate
from weightsmith.study.run import BASE
from weightsmith.study.suite import Suite
from weightsmith.study.suite_data import unlimited
from weightsmith.study.suite_file import Bound, SuiteRun
from weightsmith.study.suite_lab import JOINT, Cost, Lab, Scores, beside, scores_of
from weightsmith.study.suite_methods import choose, judge_on, methods_of, swept

__all__ = ["Cell", "CellsResult", "cells", "drawn"]

Say = Callable[[str], None]
SMALL = 1e-6


@dataclass(frozen=True)
class Cell:
    """One merged subset.

    size, base   of the rung: its size and kind;  mean: over all test tasks, higher is better
    held_in      score / the expert's, mean over the merged experts' tasks;  held_out: score / the base's
    marked       tasks of which the difference stands for the share: the divisor is 0 or less, or the base at chance
    above_base, above_best   whether `mean` is above the base's, and the best merged checkpoint's
    """

    rung: str
    size: float
    base: str
    method: str
    count: int
    subset: tuple[str, ...]
    scores: Mapping[str, float]
    mean: float
    held_in: float | None
    held_out: float | None
    above_base: bool
    above_best: bool
    marked: tuple[str, ...] = ()
    chosen: str = ""


@dataclass(frozen=True)
class CellsResult:
    """All cells, and what they say."""

    suite: str
    title: str
    source: str
    rule: str
    setting: Mapping[str, Any]
    subsets: Mapping[str, tuple[tuple[str, ...], ...]]
    trained: Mapping[str, Mapping[str, Mapping[str, float]]]  # rung -> model -> task -> score
    cells: tuple[Cell, ...]
    findings: tuple[Finding, ...]
    failed: tuple[str, ...]
    left_out: Mapping[str, str]
    warnings: tuple[str, ...]
    costs: Mapping[str, Cost] = field(default_factory=dict, compare=False)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: the same for every run of the same, interrupted or not."""
        return {key: value for key, value in asdict(self).items() if key != "costs"}


def drawn(experts: Sequence[str], count: int, subsets: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """Different subsets of a size, in recipe order; all of them where there are no more."""
    every = list(itertools.combinations(experts, count))
    if len(every) <= subsets:
        return tuple(every)
    return tuple(sorted(random.Random(f"{seed} {count}").sample(every, subsets), key=every.index))


def cells(
    run: SuiteRun, suite: Suite, labs: Mapping[str, Lab], bound: Mapping[str, Bound], wanted: Sequence[str], say: Say,
    counter: Any,
) -> CellsResult:  # fmt: skip
    """Merge every subset with every method on every base, and score it."""
    experts = _experts(run, labs)
    counts = [count for count in run.counts or suite.counts if count <= len(experts)]
    if not counts:
        raise RecipeError(
            f"{run.file}: {len(experts)} experts are fewer than the smallest count, {min(run.counts or suite.counts)}"
        )
    subsets = {count: drawn(experts, count, run.subsets or suite.subsets, run.seed) for count in counts}
    _check(run, suite, bound, experts)
    parts = {(label, s): lab.part(s) for label, lab in labs.items() for found in subsets.values() for s in found}
    tests = [one for one in bound.values() if one.task.role in ("test", "held-out")]
    proxies = _proxies(run, bound)
    made, left_out = methods_of(run, suite, list(labs.values()), wanted, tune=bool(proxies))
    if not proxies and (several := [label for label, found in made.items() if len(found) > 1]):
        raise RecipeError(
            f"{run.file}: methods.{several[0]} has lists of values; a design with subsets takes one setting each, or "
            "tune: grid and tasks of role: proxy to choose on"
        )
    counter.total = len(tests) * (len(parts) * len(made) + len(labs) * (1 + len(experts)))
    say(f"{suite.title}: {len(labs)} bases, {len(made)} methods, {sum(map(len, subsets.values()))} subsets")
    trained: dict[str, dict[str, dict[str, float]]] = {}
    costs: dict[str, Cost] = {}
    failed: list[str] = []
    found: list[Cell] = []
    for label, lab in labs.items():
        trained[label] = _trained(lab, tests, costs.setdefault(f"{label} trained".strip(), Cost()))
        for count in counts:
            for subset in subsets[count]:
                part = parts[label, subset]
                inside = [one for one in proxies if one.task.domain in subset]
                judge = judge_on(part, inside, suite.rule) if inside else lambda scores: 0.0
                with _together(part, made, tests) as folders:
                    for method, grid in made.items():
                        tried = grid if inside else grid[:1]
                        cost = costs.setdefault(f"{label} {method}".strip(), Cost())
                        choice = choose(part, method, tried, inside, tests, judge, cost, folders.get(method))
                        on = f" on {label}" if label else ""
                        failed += [f"{method} of {', '.join(subset)}{on}: {text}" for text in choice.failed.values()]
                        if choice.candidate is None or choice.scores is None:
                            continue
                        raw = scores_of(choice.scores, tests, method)
                        found.append(_cell(label, lab, method, choice.candidate, subset, raw, trained[label], tests))
        say(f"  {label or 'base'}: {sum(cell.rung == label for cell in found)} cells")
    told = shares(found) if suite.design == "wild" else findings(found, trained, [one.task for one in tests])
    return CellsResult(
        suite=suite.name,
        title=run.title or suite.title,
        source=suite.source,
        rule=suite.rule.words,
        setting=next(iter(labs.values())).setting.identity(),
        subsets={str(count): value for count, value in subsets.items()},
        trained=trained,
        cells=tuple(found),
        findings=tuple(told),
        failed=tuple(failed),
        left_out=dict(left_out),
        warnings=tuple(_warnings(run, labs, trained, tests)),
        costs=costs,
    )


def _experts(run: SuiteRun, labs: Mapping[str, Lab]) -> tuple[str, ...]:
    """The experts that every base has; RecipeError where they differ."""
    first, *others = labs.items()
    for label, lab in others:
        if set(lab.experts) != set(first[1].experts):
            odd = sorted(set(lab.experts) ^ set(first[1].experts))
            raise RecipeError(
                f"{run.file}: bases.{label} and bases.{first[0]} have different experts ({some(odd)}); cells are "
                "compared in pairs, so every base has the same"
            )
    return first[1].experts


def _proxies(run: SuiteRun, bound: Mapping[str, Bound]) -> list[Bound]:
    """The tasks that coefficients are chosen on, where that is asked for; RecipeError where only one half is."""
    proxies = [one for one in bound.values() if one.task.role == "proxy"]
    asked = "tune" in run.model_fields_set and run.tune == "grid"
    if asked and not proxies:
        raise RecipeError(f"{run.file}: tune: grid, but there is no task of role: proxy to choose on")
    if proxies and not asked:
        raise RecipeError(
            f"{run.file}: tasks.{proxies[0].name} has role: proxy; say tune: grid to choose every cell's coefficients"
        )
    return proxies


def _check(run: SuiteRun, suite: Suite, bound: Mapping[str, Bound], experts: Sequence[str]) -> None:
    """Held-in tasks belong to experts; there is something to average."""
    if suite.design != "scale":
        return
    faults = [
        f"{run.file}: tasks.{name}: domain {one.task.domain!r} is no expert; held-in tasks have an expert's name as "
        "domain, others role: held-out"
        for name, one in bound.items()
        if one.task.role in ("test", "proxy") and one.task.domain not in experts
    ]
    homeless = [name for name in experts if not any(one.task.domain == name for one in bound.values())]
    faults += [f"{run.file}: expert {name} has no task of its domain" for name in homeless]
    if faults:
        raise RecipeError(*faults)


def _trained(lab: Lab, tests: Sequence[Bound], cost: Cost) -> dict[str, dict[str, float]]:
    """Base, experts and the joint model, on every task; each once."""
    found: dict[str, Scores] = {name: lab.trained(name, tests, cost) for name in (BASE, *lab.experts)}
    if lab.rung.joint:
        found[JOINT] = lab.given(JOINT, lab.rung.joint, tests, cost)
    return {name: scores_of(scores, tests, name) for name, scores in found.items()}


@contextlib.contextmanager
def _together(
    part: Lab, made: Mapping[str, tuple[Candidate, ...]], tests: Sequence[Bound]
) -> Iterator[Mapping[str, Path]]:
    """All methods of one subset in one pass over its experts, where they have to lie in folders."""
    if all(in_memory(one.kind) for one in tests):
        yield {}
        return
    single = {f"m{at}": (method, tried[0]) for at, (method, tried) in enumerate(made.items()) if len(tried) == 1}
    with swept(part, {name: candidate for name, (_, candidate) in single.items()}, tests) as folders:
        yield {method: folders[name] for name, (method, _) in single.items() if name in folders}


def _cell(
    label: str, lab: Lab, method: str, candidate: Candidate, subset: Sequence[str], raw: Mapping[str, float],
    trained: Mapping[str, Mapping[str, float]], tests: Sequence[Bound],
) -> Cell:  # fmt: skip
    base, marked = trained[BASE], []

    def share(one: Bound, against: str) -> float:
        value, divisor = one.task.up(raw[one.name]), one.task.up(trained[against][one.name])
        at_chance = one.task.chance is not None and abs(base[one.name] - one.task.chance) < SMALL and against == BASE
        if divisor < SMALL or at_chance:
            marked.append(one.name)
            return float(value - divisor)
        return float(value / divisor)

    inside = [share(one, one.task.domain) for one in tests if one.task.role == "test" and one.task.domain in subset]
    outside = [share(one, BASE) for one in tests if one.task.role == "held-out"]
    all_tests = [one for one in tests if one.task.role == "test"]
    mean = {name: statistics.fmean(one.task.up(scores[one.name]) for one in all_tests)
            for name, scores in {**trained, "": raw}.items()}  # fmt: skip
    return Cell(
        rung=label,
        size=lab.rung.size,
        base=lab.rung.kind,
        method=method,
        count=len(subset),
        subset=tuple(subset),
        scores=raw,
        mean=mean[""],
        held_in=statistics.fmean(inside) if inside else None,
        held_out=statistics.fmean(outside) if outside else None,
        above_base=mean[""] > mean[BASE],
        above_best=mean[""] > max(mean[name] for name in subset),
        marked=tuple(marked),
        chosen=candidate.label,
    )


_BY_TOKEN = frozenset({"perplexity", "log_likelihood", "token_accuracy", "exact"})


def _tokenizer(lab: Lab) -> str | None:
    """What tells the tokenizer of a base from others."""
    base = lab.rung.recipe.base
    found = beside(base) or {} if base is not None else {}
    return found.get("tokenizer.json") or found.get("tokenizer.model") or found.get("vocab.json")


def _warnings(
    run: SuiteRun,
    labs: Mapping[str, Lab],
    trained: Mapping[str, Mapping[str, Mapping[str, float]]],
    tests: Sequence[Bound],
) -> Iterator[str]:
    lab = next(iter(labs.values()))
    if lab.setting.limit is not None:
        yield f"indicative only: at most {lab.setting.limit} examples per task"
        yield from unlimited(tests)
    if run.tune == "grid" and "tune" in run.model_fields_set:
        yield "the coefficients of every cell are chosen on the proxies of the experts that it merges"
    else:
        yield "every method has one setting, that of its paper or of the run's file: nothing is chosen on test data"
    for label, other in labs.items():
        where = f"{label}: " if label else ""
        low = [name for name, source in other.inputs.experts.items() if adapter_in(source) is not None]
        if low and len(low) < len(other.experts):
            yield f"{where}{', '.join(low)} are adapters and the others full models, which merge differently"
    by_token = [one.name for one in tests if one.task.metric in _BY_TOKEN]
    if by_token and len({_tokenizer(other) for other in labs.values()}) > 1:
        yield f"{', '.join(by_token)}: counted by token, but the bases have different tokenizers; take bits_per_byte"
    for label, models in trained.items():
        for one in tests:
            scores = models.get(one.task.domain)
            if scores is not None and one.task.up(scores[one.name]) < one.task.up(models[BASE][one.name]):
                who = f"{label}, expert {one.task.domain}" if label else f"expert {one.task.domain}"
                yield f"{who} is worse than the base on {one.name}: its share says little"
