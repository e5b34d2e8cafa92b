"""`weightsmith.greedy_soup`: the models that are better together, found by evaluating merges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.errors import RecipeError, did_you_mean
from weightsmith.ops.greedy import greedy
from weightsmith.run.api import merge

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GreedySoup", "greedy_soup"]


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
    trials: tuple[tuple[tuple[str, ...], float, bool], ...]
    merged: dict[str, Tensor] | Path


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
    if scores is not None and (unlike := set(scores) ^ set(names)):
        name = sorted(unlike)[0]
        missing = f"no score is given for {name!r}" if name in models else f"no model is called {name!r}"
        raise RecipeError(missing + (did_you_mean(name, names) if name not in models else ""))

    def merged(members: tuple[int, ...]) -> dict[str, Tensor]:
        found = merge({names[i]: models[names[i]] for i in members}, method, base, **options)
        assert isinstance(found, dict)
        return found

    known = [evaluate(merged((i,))) if scores is None else float(scores[name]) for i, name in enumerate(names)]
    trials = greedy(known, lambda members: float(evaluate(merged(members))))
    best = next(trial for trial in reversed(trials) if trial.kept)
    chosen = {names[i]: models[names[i]] for i in best.members}
    return GreedySoup(
        members=tuple(chosen),
        score=best.score,
        trials=tuple((tuple(names[i] for i in t.members), t.score, t.kept) for t in trials),
        merged=merge(chosen, method, base, out, **options),
    )
