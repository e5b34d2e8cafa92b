"""A suite whose experts are all merged: base, experts, joint model and methods, a row each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.io.disk import write_file
from weightsmith.recipe.text import dumps
from weightsmith.study.bench import file_name
from weightsmith.study.bootstrap import Resampled, resample
from weightsmith.study.flags import flags
from weightsmith.study.grids import Candidate
from weightsmith.study.run import BASE
from weightsmith.study.scoring import Figures, Scale
from weightsmith.study.suite import Suite, Task
from weightsmith.study.suite_data import overlaps, unlimited
from weightsmith.study.suite_file import Bound, SuiteRun
from weightsmith.study.suite_lab import JOINT, Cost, Lab, Scores, beside, scores_of
from weightsmith.study.suite_methods import choose, judge_on, methods_of

__all__ = ["SuiteRow", "TableResult", "table"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class SuiteRow:
    """One model.

    scores, errors   task -> raw score, its standard error
    regret_expert    mean over the domains that the best expert has more than this;  regret_sum: task arithmetic
    joint            this mean less the joint model's
    versus           name of another row -> (difference of the figure, low, high, tied), by paired bootstrap
    tied             whether the figure cannot be told from the best merge's
    flags            what the reader must know
    metrics          task -> all that its evaluator gave besides the score
    notes            task -> what its evaluator counted: truncated prompts, answers that were cut off
    """

    name: str
    kind: str  # base, expert, joint, checkpoint, merge
    scores: Mapping[str, float]
    errors: Mapping[str, float]
    figures: Figures
    chosen: str = ""
    recipe: str = ""
    regret_expert: float | None = None
    regret_sum: float | None = None
    joint: float | None = None
    versus: Mapping[str, tuple[float, float, float, bool]] = field(default_factory=dict)
    tied: bool = False
    flags: tuple[str, ...] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TableResult:
    """All that a run found out, without what depends on the machine: see `costs`."""

    suite: str
    title: str
    source: str
    rule: str
    setting: Mapping[str, Any]
    tasks: tuple[Mapping[str, Any], ...]
    rows: tuple[SuiteRow, ...]
    tried: Mapping[str, Mapping[str, float]]
    failed: tuple[str, ...]
    left_out: Mapping[str, str]
    warnings: tuple[str, ...]
    costs: Mapping[str, Cost] = field(default_factory=dict, compare=False)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: the same for every run of the same, interrupted or not."""
        return {key: value for key, value in asdict(self).items() if key != "costs"}


# --- the table ---------------------------------------------------------------------------------------


def table(
    run: SuiteRun, suite: Suite, lab: Lab, bound: Mapping[str, Bound], wanted: Sequence[str], out: Path, say: Say
) -> TableResult:
    """Score everything, choose coefficients on the proxies, and hold all against all."""
    tests = [one for one in bound.values() if one.task.role != "proxy"]
    proxies = [one for one in bound.values() if one.task.role == "proxy"]
    tune = run.tune == "grid" and bool(proxies)
    made, left_out = methods_of(run, suite, [lab], wanted, tune)
    if not tune and any(len(found) > 1 for found in made.values()):
        raise RecipeError(f"{run.file}: methods has lists of values, but there is no task of role: proxy to choose on")
    costs: dict[str, Cost] = {}
    given = [(BASE, "base"), *((f"expert {name}", "expert") for name in lab.experts)]
    found: dict[str, Scores] = {BASE: lab.trained(BASE, tests, costs.setdefault(BASE, Cost()))}
    for name in lab.experts:
        found[f"expert {name}"] = lab.trained(name, tests, costs.setdefault(f"expert {name}", Cost()))
    _told_apart(run, lab, made)
    others = {**({JOINT: lab.rung.joint} if lab.rung.joint else {}), **run.checkpoints}
    for label, path in others.items():
        found[label] = lab.given(label, path, tests, costs.setdefault(label, Cost()))
        given.append((label, JOINT if label == JOINT else "checkpoint"))
    tasks = [one.task for one in tests]
    raw = {name: scores_of(scores, tests, name) for name, scores in found.items()}
    experts = {name: raw[f"expert {name}"] for name in lab.experts}
    scale = Scale(tasks, suite.rule, raw[BASE], experts, _homes(run, suite, lab, tasks))
    judge = judge_on(lab, proxies, suite.rule) if tune else None
    tried: dict[str, Mapping[str, float]] = {}
    failed: list[str] = []
    picks: dict[str, Candidate] = {}
    for label, candidates_ in made.items():
        cost = costs.setdefault(label, Cost())
        choice = choose(lab, label, candidates_, proxies, tests, judge or (lambda scores: 0.0), cost)
        failed += [f"{label}, {which}: {text}" for which, text in choice.failed.items()]
        if choice.tried:
            tried[label] = dict(choice.tried)
        if choice.candidate is None or choice.scores is None:
            left_out = {**left_out, label: "no merge of it could be made"}
            say(f"  {label}: no merge of it could be made")
            continue
        picks[label], found[label] = choice.candidate, choice.scores
        raw[label] = scores_of(choice.scores, tests, label)
        given.append((label, "merge"))
        say(_told(label, choice.candidate, scale.figures(raw[label])))
    rows = _rows(given, found, raw, scale, tests, picks, lab, out)
    return TableResult(
        suite=suite.name,
        title=run.title or suite.title,
        source=suite.source,
        rule=suite.rule.words,
        setting=lab.setting.identity(),
        tasks=tuple(_task_told(one) for one in bound.values()),
        rows=tuple(rows),
        tried=tried,
        failed=tuple(failed),
        left_out=dict(left_out),
        warnings=(*_warnings(run, suite, lab, bound, tune), *_unknown(tests, scale, found)),
        costs=costs,
    )


def _told_apart(run: SuiteRun, lab: Lab, methods: Iterable[str]) -> None:
    """RecipeError for a row that would take another's name."""
    taken = {BASE, JOINT, *(f"expert {name}" for name in lab.experts)}
    wrong = [f"{run.file}: checkpoints.{name}: the name of another row; choose one" for name in run.checkpoints
             if name in taken]  # fmt: skip
    taken |= run.checkpoints.keys()
    wrong += [f"{run.file}: methods.{name}: the name of another row; choose one" for name in methods if name in taken]
    if wrong:
        raise RecipeError(*wrong)


def _task_told(one: Bound) -> dict[str, Any]:
    return {**asdict(one.task), "evaluator": one.kind, "told": one.spec.model_dump(mode="json", exclude={"seconds"})}


def _homes(run: SuiteRun, suite: Suite, lab: Lab, tasks: Sequence[Task]) -> dict[str, str]:
    """Domain -> the expert at home there."""
    domains = list(dict.fromkeys(task.domain for task in tasks if task.role == "test"))
    wrong = [
        f"{run.file}: homes.{d}: no expert {n!r}{did_you_mean(n, lab.experts)}"
        for d, n in run.homes.items()
        if n not in lab.experts
    ]
    wrong += [f"{run.file}: homes.{d}: no task has this domain{did_you_mean(d, domains)}" for d in run.homes
              if d not in domains]  # fmt: skip
    homes = {d: run.homes.get(d, d) for d in domains if run.homes.get(d, d) in lab.experts}
    if suite.rule.against == "expert":
        wrong += [
            f"{run.file}: no expert is called {d!r}, as its domain is; say who is at home there: homes: {{{d}: EXPERT}}"
            for d in domains
            if d not in homes and run.homes.get(d) is None
        ]
    if wrong:
        raise RecipeError(*wrong)
    return homes


def _rows(
    given: Sequence[tuple[str, str]], found: Mapping[str, Scores], raw: Mapping[str, Mapping[str, float]], scale: Scale,
    tests: Sequence[Bound], picks: Mapping[str, Candidate], lab: Lab, out: Path,
) -> list[SuiteRow]:  # fmt: skip
    figures = {name: scale.figures(scores) for name, scores in raw.items()}
    merges = [name for name, kind in given if kind == "merge" and figures[name].figure is not None]
    top = max(merges, key=lambda name: figures[name].figure or 0.0) if merges else None
    known = any(_examples(one, found) for one in tests)
    drawn = _resampled(tests, scale, found, raw) if known and figures[BASE].figure is not None else None
    experts = [f"expert {name}" for name in lab.experts]
    best_expert = max(figures[name].mean for name in experts)
    first = max(experts, key=lambda name: figures[name].figure or 0.0)
    total = next((name for name, one in picks.items() if [s.name for s in one.stages] == ["task_arithmetic"]), None)
    worse = scale.worse_than_base()
    rows = []
    for name, kind in given:
        versus = {}
        for other in dict.fromkeys([BASE, first, *([total] if total else []), *([top] if top else [])]):
            if drawn is not None and other != name:
                one = drawn.versus(name, other)
                versus[other] = (one.difference, one.low, one.high, one.tied)
        lost = worse.get(name.removeprefix("expert "), ()) if kind == "expert" else ()
        rows.append(
            SuiteRow(
                name=name,
                kind=kind,
                scores=raw[name],
                errors={
                    b.name: found[name][b.name].errors[b.task.metric]
                    for b in tests
                    if b.task.metric in found[name][b.name].errors
                },
                figures=figures[name],
                chosen=picks[name].label if name in picks else "",
                recipe=_kept(lab, picks[name], name, out) if name in picks else "",
                regret_expert=best_expert - figures[name].mean,
                regret_sum=figures[total].mean - figures[name].mean if total else None,
                joint=figures[name].mean - figures[JOINT].mean if JOINT in figures else None,
                versus=versus,
                tied=top is not None
                and name != top
                and kind == "merge"
                and drawn is not None
                and drawn.versus(name, top).tied,
                flags=flags(lost),
                metrics={
                    b.name: more
                    for b in tests
                    if (more := {k: v for k, v in found[name][b.name].metrics.items() if k != b.task.metric})
                },
                notes={task: one.notes for task, one in found[name].items() if one.notes},
            )
        )
    return rows


def _kept(lab: Lab, candidate: Candidate, label: str, out: Path) -> str:
    """Write the recipe of a choice; its path from the folder of the run."""
    name = f"recipes/{file_name(label)}.yaml"
    write_file(out / name, dumps(lab.recipe(candidate)))
    return name


def _resampled(
    tests: Sequence[Bound], scale: Scale, found: Mapping[str, Scores], raw: Mapping[str, Mapping[str, float]]
) -> Resampled:
    examples = {
        name: {one.name: scores[one.name].examples.get(one.task.metric, ()) for one in tests}
        for name, scores in found.items()
    }
    return resample(scale.tasks, scale.rule, scale.reference(), raw, examples)


def _examples(one: Bound, found: Mapping[str, Scores]) -> bool:
    """Whether every model has scores of single examples for a test task."""
    return one.task.role == "test" and all(scores[one.name].examples.get(one.task.metric) for scores in found.values())


def _unknown(tests: Sequence[Bound], scale: Scale, found: Mapping[str, Scores]) -> Iterator[str]:
    """What the figures leave out."""
    if nothing := [domain for domain, value in scale.reference().items() if value <= 0]:
        yield f"{', '.join(nothing)}: no part of the normalised score, as what it is divided by scores 0 or less"
    silent = [one.name for one in tests if one.task.role == "test" and not _examples(one, found)]
    if silent:
        what = "no scores of single examples with that mean, so the intervals do not know its uncertainty"
        yield f"{', '.join(silent)}: {what}"


def _warnings(run: SuiteRun, suite: Suite, lab: Lab, bound: Mapping[str, Bound], tune: bool) -> Iterator[str]:
    if lab.setting.limit is not None:
        yield f"indicative only: at most {lab.setting.limit} examples per task"
        yield from unlimited(bound.values())
    missing = [task.name for task in suite.tasks if task.role == "test" and task.name not in bound]
    if missing:
        yield f"not the whole suite: no data given for {', '.join(missing)}"
    for what, wanted, given in (
        ("expert", suite.experts, lab.experts),
        ("checkpoint", suite.checkpoints, run.checkpoints),
    ):
        if lacking := [name for name in wanted if name not in given and name not in run.homes]:
            yield f"not the whole suite: no {what} called {', '.join(lacking)}"
    yield from overlaps(bound)
    if not tune:
        why = "tune: none" if run.tune == "none" else "there is no task of role: proxy"
        yield f"the methods have the settings of their papers: {why}"
    else:
        tested = {one.task.domain for one in bound.values() if one.task.role == "test"}
        chosen = {one.task.domain for one in bound.values() if one.task.role == "proxy"}
        if tested - chosen:
            yield f"no proxy for {', '.join(sorted(tested - chosen))}: the coefficients are chosen without it"
    yield from template_differences(lab)


def template_differences(lab: Lab) -> Iterator[str]:
    """Experts whose chat template or tokenizer is not the base's: all get the run's one template."""
    files = ("tokenizer.json", "chat_template.jinja")
    told: dict[str, Any] = {name: beside(ref) or {} for name, ref in lab.rung.recipe.models.items()}
    base = beside(lab.rung.recipe.base) or {} if lab.rung.recipe.base is not None else {}
    for file in files:
        other = [name for name, found in told.items() if found and found.get(file) != base.get(file)]
        if other:
            names = ", ".join(other)
            yield f"{file} of {names} is not the base's; every model gets the template {lab.setting.template!r}"


def _told(label: str, candidate: Candidate, figures: Figures) -> str:
    chosen = f" ({candidate.label})" if candidate.label else ""
    share = "" if figures.figure is None else f", normalised {figures.figure:.3f}"
    return f"  {label}{chosen}: mean {figures.mean:.4g}{share}"
