"""The methods of a run: their candidates, and the choice among them on the proxies."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import PlanError, RecipeError, WeightsmithError, did_you_mean
from weightsmith.core.problem import Problem
from weightsmith.io import system
from weightsmith.io.disk import writing
from weightsmith.study.grids import Candidate, candidates
from weightsmith.study.scoring import Scale
from weightsmith.study.suite import Rule, Suite
from weightsmith.study.suite_file import Bound, SuiteRun
from weightsmith.study.suite_lab import Cost, Lab, Scores, scores_of

__all__ = ["Chosen", "choose", "judge_on", "methods_of", "swept", "thinned"]


@dataclass(frozen=True)
class Chosen:
    """A method with what was tried; `candidate` is None where no merge of it could be made."""

    candidate: Candidate | None
    tried: Mapping[str, float]
    failed: Mapping[str, str]
    scores: Scores | None


# --- methods -----------------------------------------------------------------------------------------


def methods_of(run: SuiteRun, suite: Suite, labs: Sequence[Lab], wanted: Sequence[str], tune: bool) -> tuple[
    dict[str, tuple[Candidate, ...]], dict[str, str]
]:  # fmt: skip
    """Label -> candidates (the paper's settings first), and label -> why it is left out.

    Methods that the run or the user names must be possible: PlanError holds every problem.
    """
    experts = labs[0].experts
    if run.methods is not None:
        made: dict[str, tuple[Candidate, ...]] = dict(run.methods)
    else:
        made = {}
        for label, method in (suite.methods or {}).items():
            settings = candidates(method.paper(experts))
            grid = candidates(method.grid(experts)) if tune and method.grid is not None else ()
            made[label] = thinned((settings[0], *(one for one in grid if one.stages != settings[0].stages)), run.budget)
    for label in wanted:
        if label not in made:
            raise RecipeError(f"--methods: no method {label!r} in this run{did_you_mean(label, made)}")
    made = {label: found for label, found in made.items() if not wanted or label in wanted}
    problems: dict[str, list[Problem]] = {}
    for label, found in made.items():
        seen = [problem for lab in labs for problem in lab.problems(found[0])]
        if seen:
            problems[label] = list(dict.fromkeys(seen))
    if problems and (wanted or run.methods is not None):
        raise PlanError([problem.of(label) for label, found in problems.items() for problem in found])
    if len(problems) == len(made):
        raise PlanError([problem.of(label) for label, found in problems.items() for problem in found])
    left_out = {label: found[0].text for label, found in problems.items()}
    return {label: found for label, found in made.items() if label not in problems}, left_out


def thinned(made: Sequence[Candidate], most: int) -> tuple[Candidate, ...]:
    """At most `most` candidates: the first, and whichever is farthest from those that are kept, in the grid's order.

    So a grid of two axes becomes a coarser one, and not its diagonal.
    """
    if len(made) <= most:
        return tuple(made)
    places, kept = _places(made), [0]
    near = [math.dist(place, places[0]) for place in places]
    while len(kept) < most:
        kept.append(max(range(len(made)), key=near.__getitem__))
        near = [min(old, math.dist(place, places[kept[-1]])) for old, place in zip(near, places, strict=True)]
    return tuple(made[at] for at in sorted(kept))


def _places(made: Sequence[Candidate]) -> list[tuple[float, ...]]:
    """Where in the grid every candidate stands: along each axis from 0, the first value, to 1, the last."""
    axes = []
    for at, stage in enumerate(made[0].stages):
        for key in stage.parameters:
            given = [one.stages[at].parameters.get(key) for one in made]
            numbers = all(isinstance(value, int | float) for value in given)
            values: list[Any] = sorted(set(given)) if numbers else list(dict.fromkeys(map(repr, given)))
            axes.append([values.index(v if numbers else repr(v)) / max(len(values) - 1, 1) for v in given])
    return list(zip(*axes, strict=True))


def choose(
    lab: Lab, label: str, made: Sequence[Candidate], proxies: Sequence[Bound], tests: Sequence[Bound],
    judge: Callable[[Scores], float], cost: Cost, place: Path | None = None,
) -> Chosen:  # fmt: skip
    """Choose on the proxies, then score the choice on the tests, once.  The inputs are read once for all candidates.

    place   where the merge of a single candidate lies already
    """
    tried: dict[str, float] = {}
    failed: dict[str, str] = {}
    named = {f"c{at}": one for at, one in enumerate(made)}
    spent: dict[str, Cost] = {}
    cost.candidates += len(made)
    with swept(lab, {} if len(made) == 1 else named, proxies) as folders:
        for name, one in named.items() if len(made) > 1 else ():
            try:
                took = spent.setdefault(name, Cost())
                found = lab.candidate(one, f"{label}, {_called(one)}", proxies, took, folders.get(name))
                tried[_called(one)] = judge(found)
            except RecipeError:
                raise  # of the evaluator: nothing about this candidate
            except WeightsmithError as error:
                failed[_called(one)] = str(error)
        able = [name for name, one in named.items() if _called(one) in tried] if len(made) > 1 else list(named)
        best = max(able, key=lambda name: tried.get(_called(named[name]), 0.0), default="")  # of equal ones the first
        for name, took in spent.items():
            cost.tuned(took, merged=name != best)
        if not best:
            return Chosen(None, tried, failed, None)
        try:
            scores = lab.candidate(named[best], label, tests, cost, folders.get(best, place))
        except RecipeError:
            raise
        except WeightsmithError as error:
            return Chosen(None, tried, {**failed, _called(named[best]): str(error)}, None)
    return Chosen(named[best], tried, failed, scores)


def judge_on(lab: Lab, proxies: Sequence[Bound], rule: Rule) -> Callable[[Scores], float]:
    """What is maximised on the proxies: the mean over domains, each as a share of the best expert's."""
    tasks = [replace(one.task, role="test") for one in proxies]
    experts = {name: scores_of(lab.trained(name, proxies), proxies, name) for name in lab.experts}
    scale = Scale(tasks, replace(rule, against="best"), next(iter(experts.values())), experts)

    def judge(found: Scores) -> float:
        figures = scale.figures(scores_of(found, proxies, "a candidate"))
        whole = len(figures.normalised) == len(figures.domains)  # else the rest would be chosen without a domain
        return figures.figure if whole and figures.figure is not None else figures.mean

    return judge


def _called(one: Candidate) -> str:
    return one.label or "the paper's settings"


@contextlib.contextmanager
def swept(lab: Lab, named: Mapping[str, Candidate], proxies: Sequence[Bound]) -> Iterator[Mapping[str, Path]]:
    """Folders of the candidates that were not scored before, made in one pass over the inputs.

    None where they do not fit in half of the free disk, or one of them cannot be made: then each is merged by itself.
    """
    missing = {name: one for name, one in named.items() if not lab.known(one, proxies)}
    if len(missing) < 2 or not _fits(lab, len(missing)):
        yield {}
        return
    with contextlib.ExitStack() as stack:
        try:
            folders = stack.enter_context(lab.swept(missing))
        except RecipeError:
            raise
        except WeightsmithError:
            folders = {}
        yield folders


def _fits(lab: Lab, count: int) -> bool:
    base = lab.inputs.base
    size = sum(key.nbytes for key in base.keys.values()) if base is not None else 0
    with writing(lab.room):
        system.call(lab.room.mkdir, parents=True, exist_ok=True)
        return 2 * count * size < system.call(shutil.disk_usage, lab.room).free
