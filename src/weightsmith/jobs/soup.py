"""Soups: which of several models are merged is chosen by their scores, or by those of merges (the greedy soup)."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import PlanError, RecipeError, did_you_mean
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.inputs.opened import Inputs
from weightsmith.io import system
from weightsmith.io.disk import writing
from weightsmith.io.url import absolute
from weightsmith.jobs.api import merge
from weightsmith.jobs.job import Job, Result
from weightsmith.jobs.merge import merge_job, run
from weightsmith.jobs.nested import open_inputs
from weightsmith.ops.greedy import greedy
from weightsmith.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.io.url import Url

__all__ = ["FolderSoup", "GreedySoup", "greedy_soup", "soup"]

Trials = tuple[tuple[tuple[str, ...], float, bool], ...]
"""(names tried, their score, whether the last of them was kept), in order."""


@dataclass(frozen=True)
class GreedySoup:
    """What a greedy soup consists of.

    members  names of the models that were kept, in the order in which they came in
    score    of their merge
    trials   (names tried, their score, whether the last of them was kept), in order
    merged   the merged tensors, or the folder where `out` was given
    """

    members: tuple[str, ...]
    score: float
    trials: Trials
    merged: dict[str, Tensor] | Path | Url


def greedy_soup(
    models: Mapping[str, Any],
    evaluate: Callable[[dict[str, Tensor]], float],
    scores: Mapping[str, float] | None = None,
    method: Any = "average",
    base: Any = None,
    out: str | Path | None = None,
    **options: Any,
) -> GreedySoup:
    """Go through the models by falling score and keep each with which the merge scores no worse.

    models    name -> model, as `merge` takes them
    evaluate  merged tensors -> their score on held-out data, higher is better
    scores    of each model by itself, on the same data; default: found by `evaluate`
    method    how the kept ones are merged (published: their plain mean); `base`, `out` and options as for `merge`

    Costs one merge in memory and one evaluation per model; use data that you do not report results on.
    Source: Model soups (Wortsman et al., ICML 2022), arXiv:2203.05482.  Raises what `merge` raises.
    """
    names = list(models)
    if not names:
        raise RecipeError("no models to merge; give at least one")
    _check_scores(names, scores)

    def merged(members: Sequence[str]) -> dict[str, Tensor]:
        found = merge({name: models[name] for name in members}, method, base, **options)
        assert isinstance(found, dict)
        return found

    trials = _greedy(names, lambda members: float(evaluate(merged(members))), scores)
    best = next(trial for trial in reversed(trials) if trial[2])
    chosen = {name: models[name] for name in best[0]}
    return GreedySoup(best[0], best[1], trials, merge(chosen, method, base, out, **options))


@dataclass(frozen=True)
class FolderSoup:
    """What a soup in a folder consists of.

    members  names of the models that were merged, in the recipe's order
    score    of their merge; None where it was not asked for
    trials   what the greedy soup tried; empty for others
    result   of the merge that was kept
    """

    members: tuple[str, ...]
    score: float | None
    trials: Trials
    result: Result


def soup(
    recipe: Recipe,
    out: Path,
    score: Callable[[Path], float] | None = None,
    settings: Settings = DEFAULT,
    *,
    scores: Mapping[str, float] | None = None,
    size: int | None = None,
    lower_is_better: bool = False,
    remember: Callable[[Any, Callable[[], float]], float] | None = None,
    tell: Callable[[tuple[str, ...], float], None] | None = None,
    **options: Any,
) -> FolderSoup:
    """Merge the models of a recipe that are better together into the folder `out`, as the recipe says.

    score     a folder with a merge -> its score on held-out data: the greedy soup, which goes through the models from
              the best one by itself and keeps each with which the merge scores no worse
    scores    of each model by itself; without them `score` finds them, by merging each alone
    size      without `score`: how many of the best are merged; without `scores` too all are, the uniform soup
    remember  (what is scored, as JSON can hold it; a function that scores it) -> its score, kept from earlier runs
    tell      takes (names, score) of every trial
    options   change single settings

    Every trial is merged into a folder beside `out`, which is deleted when it has been scored.
    Source: Model soups (Wortsman et al., ICML 2022), arXiv:2203.05482.
    Raises RecipeError or PlanError before anything is merged, with every problem of the recipe and of `out`.
    """
    settings = settings.but(**options)
    names = list(recipe.models)
    _check_scores(names, scores)
    _check_size(names, score is not None, scores, size)
    whole = merge_job(recipe, settings, out)
    _check_plans(whole, out, settings, alone=score is not None and scores is None)
    if score is None:
        ranked = names if scores is None else sorted(names, key=scores.__getitem__, reverse=not lower_is_better)
        trials: Trials = ()
        members, reached = ranked[:size], None
    else:
        sign = -1.0 if lower_is_better else 1.0
        with _room(out) as room:

            def measured(tried: Sequence[str]) -> float:
                part = _of(recipe, tried)

                def measure() -> float:
                    run(part, room / "merge", settings, sources=_inputs(part), overwrite=True, resume=False)
                    return score(room / "merge")

                told = [part.model_dump(mode="json", exclude_defaults=True), whole.identify()]
                found = measure() if remember is None else remember(told, measure)
                if math.isnan(found):
                    raise RecipeError(f"the score of {', '.join(part.models)} is NaN")
                if tell is not None:
                    tell(tuple(tried), found)
                return sign * found

            given = None if scores is None else {name: sign * value for name, value in scores.items()}
            trials = tuple((tried, sign * value, kept) for tried, value, kept in _greedy(names, measured, given))
        members, reached = next((list(tried), value) for tried, value, kept in reversed(trials) if kept)
    chosen = _of(recipe, members)
    result = run(chosen, out, settings, sources=_inputs(chosen))
    return FolderSoup(tuple(chosen.models), reached, trials, result)


def _check_plans(whole: Job, out: Path, settings: Settings, *, alone: bool) -> None:
    """Raise what speaks against the merge of all models, or with `alone` of one, before hours go into scores."""
    problems = list(whole.plan.problems)
    if alone and not problems:
        recipe = whole.plan.recipe
        first = _of(recipe, list(recipe.models)[:1])
        problems += merge_job(first, settings, out, _inputs(first)).plan.problems
    if problems := [*problems, *whole.obstacles(out, settings)]:
        raise PlanError(problems)


@contextlib.contextmanager
def _room(out: Path) -> Iterator[Path]:
    """A folder beside `out` for merges that are scored, which goes afterwards."""
    place = absolute(out)
    with writing(out):
        system.call(place.parent.mkdir, parents=True, exist_ok=True)
        room = Path(system.call(tempfile.mkdtemp, prefix=f"{place.name}.trial-", dir=place.parent))
    try:
        yield room
    finally:
        system.call(shutil.rmtree, room, ignore_errors=True)


def _of(recipe: Recipe, members: Sequence[str]) -> Recipe:
    """The recipe with some of its models, in its own order."""
    return recipe.model_copy(update={"models": {n: ref for n, ref in recipe.models.items() if n in members}})


def _inputs(part: Recipe) -> Inputs:
    """What such a recipe reads.  That its globs may be for the tensors of models left out is no problem."""
    return replace(open_inputs(part), partial=True)


def _greedy(
    names: Sequence[str], evaluate: Callable[[Sequence[str]], float], scores: Mapping[str, float] | None
) -> Trials:
    """The greedy soup's trials by name; scores that are not given are found by `evaluate`."""
    known = [evaluate([name]) if scores is None else float(scores[name]) for name in names]
    trials = greedy(known, lambda members: evaluate([names[i] for i in members]))
    return tuple((tuple(names[i] for i in t.members), t.score, t.kept) for t in trials)


def _check_scores(names: Sequence[str], scores: Mapping[str, float] | None) -> None:
    if scores is not None and (unlike := set(scores) ^ set(names)):
        name = sorted(unlike)[0]
        missing = f"no score is given for {name!r}" if name in names else f"no model is called {name!r}"
        raise RecipeError(missing + (did_you_mean(name, names) if name not in names else ""))


def _check_size(names: Sequence[str], greedy: bool, scores: Mapping[str, float] | None, size: int | None) -> None:
    if not names:
        raise RecipeError("no models to merge; give at least one")
    if size is not None and not 1 <= size <= len(names):
        raise RecipeError(f"size = {size} is outside [1, {len(names)}], the number of models")
    if greedy and size is not None:
        raise RecipeError(f"size = {size}: the greedy soup finds out itself how many models are better together")
    if size is not None and scores is None and size < len(names):
        raise RecipeError(f"size = {size} of {len(names)} models needs a score of each of them")
    if scores is not None and not greedy and size is None:
        raise RecipeError(
            "scores of the models alone do not say how many are better together; give a size, "
            "or what scores a merge: then it is the greedy soup"
        )
