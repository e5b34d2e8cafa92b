"""Choosing which models to merge, one after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from weightsmith.core.errors import RecipeError

__all__ = ["Trial", "greedy"]


class Trial(NamedTuple):
    """One attempt: the members tried, their score (higher is better), and whether the last one was kept."""

    members: tuple[int, ...]
    score: float
    kept: bool


def greedy(scores: Sequence[float], evaluate: Callable[[tuple[int, ...]], float]) -> list[Trial]:
    """The greedy soup: go through the models by falling score, keep each with which the merge scores no worse.

    scores    of each model by itself, higher is better; equals go by their order
    evaluate  members, in the order in which they were kept -> score of their merge on the same data

    Returns every attempt in order; the members of the last one kept are the result.  The first is the best model with
    its own score; `evaluate` is called once for each of the others.  A NaN is an error (RecipeError).
    Source: Model soups (Wortsman et al., ICML 2022), arXiv:2203.05482, recipe 1.
    """
    # A stable sort by -score: equals stay in the order of the recipe.
    first, *others = sorted(range(len(scores)), key=lambda i: -_number(scores[i], (i,)))
    best = Trial((first,), scores[first], True)
    trials = [best]
    for index in others:
        # A member is never taken out again: n - 1 merges and scores, not 2^n.
        members = (*best.members, index)
        score = _number(evaluate(members), members)
        # >=: the paper keeps a model that does not lower the score.
        trial = Trial(members, score, score >= best.score)
        trials.append(trial)
        best = trial if trial.kept else best
    return trials


def _number(score: float, members: tuple[int, ...]) -> float:
    # Every comparison with NaN is False, so it would be dropped without a word.
    if math.isnan(score):
        raise RecipeError(f"the score of models {', '.join(map(str, members))} (counted from 0) is NaN")
    return score
