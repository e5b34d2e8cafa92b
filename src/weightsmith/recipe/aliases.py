"""Names of pipelines: what other tools call one method is a filter and a method here.

`dare_ties` in a recipe means `[dare, {ties: {density: 1, scope: tensor}}]`: the random drops choose what is kept, and
TIES votes on all that is left.  Parameters written inside the name go to the first stage that has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsmith.core.method import Stage, registered, registry

__all__ = ["PIPELINES", "expand", "spelled", "stage_called", "stage_names"]

_VOTE = ("ties", {"density": 1, "scope": "tensor"})
_SUM: tuple[str, dict[str, Any]] = ("task_arithmetic", {})

PIPELINES: Mapping[str, tuple[tuple[str, Mapping[str, Any]], ...]] = {
    "dare_ties": (("dare", {}), _VOTE),
    "dare_linear": (("dare", {}), _SUM),
    "della_linear": (("della", {}), _SUM),
    "breadcrumbs_ties": (("breadcrumbs", {}), _VOTE),
}
"""Name -> stages, each with the parameters that the name fixes."""


def stage_called(name: str) -> type[Stage]:
    """Return the stage called `name`; an unknown name is an error with the nearest one, pipelines among them."""
    return registry(name, PIPELINES)


def stage_names() -> list[str]:
    """Every name that `stage_called` knows, and those of pipelines."""
    known = registered()
    return [*known, *(alias for stage in known.values() for alias in stage.traits.aliases), *PIPELINES]


def expand(name: str, parameters: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the stages that a stage's name stands for, with their parameters: itself, unless it names a pipeline."""
    if name not in PIPELINES:
        return [(name, dict(parameters))]
    stages = [(stage, dict(fixed)) for stage, fixed in PIPELINES[name]]
    for key, value in parameters.items():
        takers = [own for stage, own in stages if any(p.name == key for p in registry(stage).parameters())]
        (takers or [stages[-1][1]])[0][key] = value  # an unknown one is the last stage's to refuse
    return stages


def spelled(name: str) -> str:
    """The pipeline that a name stands for, as a recipe writes it: [dare, {ties: {density: 1, scope: tensor}}]."""
    stages = [(stage, ", ".join(f"{k}: {v}" for k, v in fixed.items())) for stage, fixed in PIPELINES[name]]
    return f"[{', '.join(f'{{{stage}: {{{inside}}}}}' if inside else stage for stage, inside in stages)}]"
