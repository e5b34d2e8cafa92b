"""The end of a search: the incumbent scored again, held-out scores beside the controls, and what it cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.recipe.schema import Recipe
from weightsmith.search.run import Search, Trial
from weightsmith.search.score import Scored
from weightsmith.search.space import key_of
from weightsmith.search.trials import Asked, Cost, Outcome

__all__ = ["Again", "Found", "Line", "found"]


@dataclass(frozen=True)
class Again:
    """One number scored several times.

    value   mean of the new scores
    error   its standard error: over the items where the evaluator tells them, or over the repetitions, the larger
    low, high  95% interval; None where nothing is known of the error
    """

    value: float
    times: int
    error: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Line:
    """A row of the final table: scores on the search split, and on the report split with its interval."""

    name: str
    search: float | None
    report: Again | None
    scores: dict[str, float]
    failed: str = ""


@dataclass(frozen=True)
class Found:
    """What a search found.

    best     the incumbent; of a front, the point that likes all goals alike
    again    its score on the search split, found anew
    front    points that no other dominates
    lines    the final table
    """

    search: Search
    best: Trial
    again: Again | None
    front: Sequence[Trial]
    lines: Sequence[Line]
    cost: Cost
    notes: Sequence[str]

    def recipe(self, trial: Trial) -> Recipe:
        """The recipe of a trial."""
        return self.search.space.recipe(trial.point)


def found(search: Search, say: Callable[[str], None] = lambda text: None) -> Found:
    """Score the incumbent again, and it and the controls on the report split.

    Raises RecipeError if no candidate could be scored.
    """
    best = search.best(search.trials)
    if best is None:
        reasons = dict.fromkeys(trial.failed for trial in search.trials if trial.failed)
        raise RecipeError(f"none of {len(search.trials)} candidates could be scored: " + "; ".join(list(reasons)[:3]))
    notes: list[str] = []
    recipe = search.space.recipe(best.point)
    again = _again(search, recipe, "search", search.file.rescore, first=1) if search.file.rescore else None
    front = search.front(search.trials) if search.aim.weights is None else []
    lines = [_line(search, "incumbent" if not front else "front: all goals alike", recipe, best.scores)]
    for i, goal in enumerate(search.aim.goals) if front else ():
        one = search.picked(front, [float(i == j) for j in range(len(search.aim.goals))])
        lines.append(_line(search, f"front: best {goal}", search.space.recipe(one.point), one.scores))
    lines.append(_line(search, "recipe as it is", search.start))
    lines.append(_expert(search))
    if search.file.controls and search.space.drawn and search.sampler.name != "random":
        say(f"control: {len(search.trials)} candidates at random")
        lines.append(_random(search))
    failed = [trial for trial in search.trials if trial.failed]
    if failed:
        notes.append(f"{len(failed)} of {len(search.trials)} candidates failed, the first: {failed[0].failed}")
    notes += [*_edges(search, best), *search.sampler.notes()]
    return Found(search, best, again, front, lines, search.evaluations.cost, notes)


def _line(search: Search, name: str, recipe: Recipe, scores: dict[str, float] | None = None) -> Line:
    value = None
    if scores is None:
        (outcome,) = search.evaluations.scored([Asked(recipe)])
        scores = None if outcome.scored is None else dict(outcome.scored.values)
    if scores is not None:
        value = search.aim.shown(_one(search, scores))
    times = 1
    (outcome,) = search.evaluations.scored([Asked(recipe, "report")])
    if outcome.scored is None:
        return Line(name, value, None, {}, outcome.failed or "")
    report = _interval(search, [outcome.scored], times)
    return Line(name, value, report, dict(outcome.scored.values))


def _one(search: Search, scores: dict[str, float]) -> float:
    """One number of several scores: what is maximised, of a front the plain mean."""
    values = search.aim.values(scores)
    return math.fsum(values) / len(values)


def _again(search: Search, recipe: Recipe, split: str, times: int, first: int = 0) -> Again | None:
    outcomes = search.evaluations.scored([Asked(recipe, split, again=first + i) for i in range(times)])
    scored = [outcome.scored for outcome in outcomes if outcome.scored is not None]
    return _interval(search, scored, len(scored)) if scored else None


def _interval(search: Search, scored: Sequence[Scored], times: int) -> Again:
    values = [_one(search, dict(one.values)) for one in scored]
    mean = math.fsum(values) / len(values)
    known = search.aim.error(scored[0])
    errors: list[float] = [] if known is None else [known]
    wide = [1.96 * error for error in errors]
    if len(values) > 1:
        from scipy.stats import t

        spread = statistics.stdev(values) / math.sqrt(len(values))
        errors.append(spread)
        wide.append(float(t.ppf(0.975, len(values) - 1)) * spread)
    shown = search.aim.shown(mean)
    if not wide or max(wide) == 0:
        return Again(shown, times, max(errors) if errors else None, None, None)
    ends = sorted(search.aim.shown(mean + sign * max(wide)) for sign in (-1, 1))
    return Again(shown, times, max(errors), ends[0], ends[1])


def _expert(search: Search) -> Line:
    """The best single expert, chosen on the search split as the candidates are."""
    alone = {name: _alone(search.file.recipe, name) for name in search.file.recipe.models}
    outcomes = search.evaluations.scored([Asked(recipe) for recipe in alone.values()])
    values = {
        name: _one(search, dict(outcome.scored.values))
        for name, outcome in zip(alone, outcomes, strict=True)
        if outcome.scored is not None
    }
    if not values:
        return Line("best single expert", None, None, {}, _why(outcomes))
    name = max(values, key=lambda one: values[one])
    return _line(search, f"best single expert ({name})", alone[name])


def _why(outcomes: Sequence[Outcome]) -> str:
    return next((outcome.failed for outcome in outcomes if outcome.failed), "")


def _alone(recipe: Recipe, name: str) -> Recipe:
    """The recipe of one model by itself."""
    tree = recipe.model_dump(mode="json", exclude_defaults=True)
    ref = tree["models"][name]
    fields = type(recipe.models[name]).model_fields
    kept = {key: value for key, value in ref.items() if key in fields} if isinstance(ref, dict) else ref
    rest = {key: value for key, value in tree.items() if key not in ("method", "parameters", "rules", "exclude")}
    return Recipe.model_validate({**rest, "models": {name: kept}, "method": "linear"})


def _random(search: Search) -> Line:
    count = len(search.trials)
    trials = search.random()
    best = search.best(trials)
    name = f"random search, {count} candidates"
    if best is None:
        return Line(name, None, None, {}, "no candidate could be scored")
    return _line(search, name, search.space.recipe(best.point), best.scores)


def _edges(search: Search, best: Trial) -> list[str]:
    """Genes whose value lies at an end of what was searched."""
    at = [
        gene.name
        for gene in search.space.genes
        if not gene.values and gene.link == "identity" and not 0.01 < gene.share(best.point[gene.name]) < 0.99
    ]
    return [f"chosen at the edge of what was searched, so a wider range may find better: {', '.join(at)}"] if at else []


def plain(made: Found) -> dict[str, Any]:
    """As JSON holds it."""
    search = made.search
    return {
        "sampler": search.sampler.name,
        "candidates": len(search.trials),
        "goals": dict(search.aim.goals),
        "weights": search.aim.weights,
        "best": {
            "candidate": made.best.number + 1,
            "point": made.best.point,
            "scores": made.best.scores,
            "recipe": key_of(made.recipe(made.best)),
        },
        "again": None if made.again is None else vars(made.again),
        "front": [_point(trial) for trial in made.front],
        "table": [{**vars(line), "report": line.report and vars(line.report)} for line in made.lines],
        "cost": vars(replace(made.cost)),
        "notes": list(made.notes),
    }


def _point(trial: Trial) -> dict[str, Any]:
    name = f"recipes/{trial.number + 1}.yaml"
    return {"candidate": trial.number + 1, "scores": trial.scores, "point": trial.point, "recipe": name}
