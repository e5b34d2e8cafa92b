"""The methods of a run: their candidates, and the choice among them on the proxies."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightsmith.core.errors import PlanError, RecipeError, WeightsmithError, did_you_mean
from weightsmith.core.problem import Problem
from weightsmith.io import system
from weightsmith.io.disk import writing
from weightsmith.study.grids import Candidate, candidates
from weightsmith.study.suite import Suite
from weightsmith.study.suite_file import Bound, SuiteRun
from weightsmith.study.suite_lab import Cost, Lab, Scores

__all__ = ["Chosen", "choose", "methods_of", "swept", "thinned"]


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
    """At most `most` candidates: the first, and others at equal steps."""
    if len(made) <= most:
        return tuple(made)
    rest, count = made[1:], most - 1
    return (made[0], *(rest[round(at * (len(rest) - 1) / max(count - 1, 1))] for at in range(count)))


def choose(
    lab: Lab, label: str, made: Sequence[Candidate], proxies: Sequence[Bound], tests: Sequence[Bound],
    judge: Callable[[Scores], float], cost: Cost,
) -> Chosen:  # fmt: skip
    """Choose on the proxies, then score the choice on the tests, once.  The inputs are read once for all candidates."""
    tried: dict[str, float] = {}
    failed: dict[str, str] = {}
    tuning = Cost()
    named = {f"c{at}": one for at, one in enumerate(made)}
    cost.candidates = len(made)
    with swept(lab, {} if len(made) == 1 else named, proxies) as folders:
        for name, one in named.items() if len(made) > 1 else ():
            try:
                found = lab.candidate(one, f"{label}, {_called(one)}", proxies, tuning, folders.get(name))
                tried[_called(one)] = judge(found)
            except RecipeError:
                raise  # of the evaluator: nothing about this candidate
            except WeightsmithError as error:
                failed[_called(one)] = str(error)
        able = [name for name, one in named.items() if _called(one) in tried] if len(made) > 1 else list(named)
        cost.tune_seconds += tuning.merge_seconds + tuning.evaluate_seconds
        cost.read_bytes, cost.write_bytes = cost.read_bytes + tuning.read_bytes, cost.write_bytes + tuning.write_bytes
        cost.peak_bytes = max(cost.peak_bytes, tuning.peak_bytes)
        if not able:
            return Chosen(None, tried, failed, None)
        best = max(able, key=lambda name: tried.get(_called(named[name]), 0.0))  # of equal ones the first in the grid
        try:
            scores = lab.candidate(named[best], label, tests, cost, folders.get(best))
        except RecipeError:
            raise
        except WeightsmithError as error:
            return Chosen(None, tried, {**failed, _called(named[best]): str(error)}, None)
    return Chosen(named[best], tried, failed, scores)


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
