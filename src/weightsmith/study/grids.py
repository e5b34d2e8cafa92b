"""Which methods a study tries, and with which coefficients: the same budget for each, chosen on validation data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from weightsmith.core.checks import Case, Level
from weightsmith.core.method import Codec, Filter, MergedFilter, Stage, registered
from weightsmith.recipe.schema import StageSpec

__all__ = ["BUDGET", "Candidate", "candidates", "edges", "left_alone", "offered"]

BUDGET = 6
"""Candidates per method at most, in the grids below."""

_SCALES = [0.4, 0.7, 1.0, 1.5, 2.2, 3.2]
_LAMBDAS = [0.1, 0.2, 0.35, 0.5, 0.8, 1.2]  # of a sum of task vectors
_FEW = [0.2, 0.4, 0.8]

Written = tuple[tuple[str, Mapping[str, Any]], ...]
"""Stages with their parameters; a list of values is an axis of the grid."""

_SUM: tuple[str, Mapping[str, Any]] = ("task_arithmetic", {})

GRIDS: Mapping[str, Written] = {
    "average": (("linear", {}),),
    "task_arithmetic": (("task_arithmetic", {"lambda": _LAMBDAS}),),
    "ties": (("ties", {"density": [0.2, 0.5], "lambda": [0.7, 1.2, 2.0]}),),
    "magnitude | task_arithmetic": (("magnitude", {"density": [0.2, 0.5]}), ("task_arithmetic", {"lambda": _FEW})),
    "dare | task_arithmetic": (("dare", {"density": [0.2, 0.5]}), ("task_arithmetic", {"lambda": _FEW})),
    "dare | ties": (("dare", {"density": [0.5, 0.8]}), ("ties", {"density": 1.0, "lambda": [0.5, 1.0, 2.0]})),
    "della | task_arithmetic": (("della", {"density": [0.2, 0.5]}), ("task_arithmetic", {"lambda": _FEW})),
    "della | ties": (("della", {"density": [0.5, 0.8]}), ("ties", {"density": 1.0, "lambda": [0.5, 1.0, 2.0]})),
    "breadcrumbs | task_arithmetic": (
        ("breadcrumbs", {"density": [0.5, 0.9]}),
        ("task_arithmetic", {"lambda": _FEW}),
    ),
    "task_arithmetic | consensus": (
        _SUM,
        ("consensus", {"lambda": _FEW, "tall_mask_lambda": [0.2, 0.4]}),
    ),
    "task_arithmetic | lines": (_SUM, ("lines", {"beta": [0.2, 0.4, 0.7, 1.0, 1.5, 2.2]})),
    "ties | lines": (("ties", {"density": [0.2, 0.5]}), ("lines", {"beta": [0.5, 1.0, 2.0]})),
    "pcb": (("pcb", {"ratio": [0.1, 0.2], "lambda": [0.5, 1.0, 2.0]}),),
    "sce": (("sce", {"select_topk": [0.1, 0.2, 0.4, 0.6, 0.8, 1.0]}),),
    "magmax": (("magmax", {"lambda": _SCALES}),),
    "emr": (("emr", {"lambda": _SCALES}),),
    "ram": (("ram", {"epsilon": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]}),),
    "ramplus_tl": (("ramplus_tl", {"epsilon": [3e-4, 1e-3, 3e-3], "r": [0.1, 0.5]}),),
    "model_stock": (("model_stock", {"filter_wise": [False, True]}),),
    "tsvm": (("tsvm", {"scaling": _SCALES}),),
    "r_tsvm": (("r_tsvm", {"scaling": _SCALES}),),
    "iso_c": (("iso_c", {"scaling": _SCALES}),),
    "iso_cts": (("iso_cts", {"scaling": [1.0, 1.7, 3.0], "common_space_fraction": [0.6, 0.8]}),),
    "knots": (("knots", {"density": [0.3, 1.0], "scaling": [0.7, 1.5, 3.0]}),),
    "wudi": (("wudi", {"lr": [1e-5, 1e-4], "scaling": [0.5, 1.0]}),),
    "optmerge": (("optmerge", {"scaling": [0.2, 0.5, 1.2]}),),
    "swudi": (("swudi", {"time": [100.0, 300.0], "scaling": [0.5, 0.7, 1.0]}),),
    "aswudi": (("aswudi", {"scaling": _SCALES}),),
    "doge": (("doge", {"lambda": [0.06, 0.2, 0.6], "embeddings": True}),),
    "opcm": (("opcm", {"alpha": [0.1, 0.3, 0.4, 0.5, 0.6, 0.8]}),),
    "widen": (("widen", {"above_average_value_ratio": [0.5, 1.0, 2.0], "score_calibration_value": [0.5, 1.0]}),),
    "fisher": (("fisher", {"floor": [1e-12, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6]}),),
    "regmean": (("regmean", {"alpha": [0.1, 0.3, 0.5, 0.7, 0.9, 1.0]}),),
}
"""What is tried where a study names no methods.  A method without an entry (a plug-in) is tried as it is.

wudi, optmerge and doge, which take hundreds of steps per matrix, get fewer candidates."""

_LEFT_OUT = {
    "keep": "it is the base",
    "soup": "it needs a score of each model; without one it is the average",
    "mwa": "it needs a metric of each checkpoint of one run; without one it is the average",
}


@dataclass(frozen=True)
class Candidate:
    """One method with one choice of its coefficients; `label` shows what the grid chose."""

    stages: tuple[StageSpec, ...]
    label: str


def candidates(written: Written) -> tuple[Candidate, ...]:
    """Every combination of the values in lists.  A list that is itself a value (a ramp over depth) stands in a list."""
    axes = [
        (at, key, value if isinstance(value, list) else [value])
        for at, (_, parameters) in enumerate(written)
        for key, value in parameters.items()
    ]
    made = []
    for values in product(*(options for _, _, options in axes)):
        parts: list[dict[str, Any]] = [{} for _ in written]
        shown = []
        for (at, key, options), value in zip(axes, values, strict=True):
            parts[at][key] = value
            if len(options) > 1:
                shown.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
        stages = tuple(StageSpec(name=n, parameters=p) for (n, _), p in zip(written, parts, strict=True))
        made.append(Candidate(stages, ", ".join(shown)))
    return tuple(made)


def left_alone(made: Sequence[Candidate]) -> Candidate:
    """The candidate without what is searched: what differs between candidates is left to its default."""
    first = made[0]
    stages = []
    for at, stage in enumerate(first.stages):
        fixed = {
            key: value
            for key, value in stage.parameters.items()
            if all(one.stages[at].parameters.get(key) == value for one in made)
        }
        stages.append(stage.model_copy(update={"parameters": fixed}))
    return Candidate(tuple(stages), "defaults") if len(made) > 1 else first


def edges(made: Sequence[Candidate], chosen: Candidate) -> tuple[str, ...]:
    """Parameters whose chosen value is the smallest or largest of three or more that were tried."""
    found = []
    for at, stage in enumerate(chosen.stages):
        for key, value in stage.parameters.items():
            tried = [one.stages[at].parameters[key] for one in made]
            plain = all(isinstance(v, int | float) and not isinstance(v, bool) for v in tried)
            if plain and len(set(tried)) >= 3 and value in (min(tried), max(tried)):
                found.append(key)
    return tuple(found)


def offered(count: int, statistics: Iterable[str], has_depth: bool) -> tuple[dict[str, Written], dict[str, str]]:
    """What can be tried on `count` experts, and method -> why it is left out.

    statistics  those that every expert has; has_depth: whether the tensors' names show more than one block.
    """
    known = registered()
    held = {"base", *statistics}
    refused = {name: text for name, cls in known.items() if (text := _reason(cls, count, held, has_depth))}
    grids = dict(GRIDS)
    covered = {name for written in grids.values() for name, _ in written}
    for name, cls in known.items():
        if name not in covered and name not in refused:
            grids[name] = _alone(cls)
    chosen = {label: written for label, written in grids.items() if all(name not in refused for name, _ in written)}
    return chosen, refused


def _reason(cls: type[Stage], count: int, held: set[str], has_depth: bool) -> str:
    """Why a method is not tried; '' if it is."""
    traits = cls.traits
    if issubclass(cls, Codec):
        return "it keeps every expert: there is no one merged model"
    if traits.name in _LEFT_OUT:
        return _LEFT_OUT[traits.name]
    if missing := [need for need in traits.needs if need not in held]:
        return f"not every expert has the statistic {', '.join(missing)}; weightsmith observe makes it"
    case = Case(count, blocks="" if has_depth else "the tensors' names show no blocks")
    refused = (text for check in traits.checks for level, text, _ in check(cls(), case) if level is Level.REFUSE)
    return next((f"it {text}" for text in refused), "")


def _alone(cls: type[Stage]) -> Written:
    """A method without a grid as it is, a filter beside task arithmetic; a scale is searched where there is one."""
    names = {p.name for p in cls.parameters()}
    scale: dict[str, Any] = next(({name: _SCALES} for name in ("lambda", "scaling") if name in names), {})
    own = (cls.traits.name, scale)
    if not issubclass(cls, Filter):
        return (own,)
    if issubclass(cls, MergedFilter):
        return (("task_arithmetic", {}), own)
    return ((cls.traits.name, {}), ("task_arithmetic", {"lambda": _LAMBDAS}))
