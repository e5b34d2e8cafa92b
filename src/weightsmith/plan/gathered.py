"""What is averaged by default, whatever the method: running statistics, and heads that the base does not have.

A method that drops changes, or goes beyond the models, makes variances (of BatchNorm) negative and the model's outputs
NaN.  Heads that several models trained and the base lacks have no base that they changed from.
"""

from __future__ import annotations

from typing import Any

from weightsmith.core.keys import Key, gathered
from weightsmith.core.method import Pipeline, registry
from weightsmith.core.problem import Tensors
from weightsmith.inputs.opened import Inputs

__all__ = ["STATISTICS", "averaged", "averaged_kind", "averaging"]

STATISTICS = "running statistics"


def averaged_kind(key: Key, inputs: Inputs) -> str:
    """What a tensor is, in words, if it is averaged; '' for all others."""
    if inputs.base is not None and key.name in inputs.base.origin.heads:
        return "heads that the base lacks"
    return STATISTICS if gathered(key.name) else ""


def averaged(pipeline: Pipeline, count: int) -> Pipeline | None:
    """The mean of `count` models in place of a pipeline, with its weights where none is negative.

    None where the pipeline is such a mean, or stays between the two models (slerp).
    """
    method: Any = pipeline.method
    weight = getattr(method, "weight", 1.0)
    weights = weight if isinstance(weight, tuple) else (float(weight),) * count
    fair = min(weights) >= 0 and sum(weights) > 0
    if len(pipeline.stages) == 1 and (
        method.name == "slerp" or (method.name == "linear" and method.normalize and fair)
    ):
        return None
    mean: Any = registry("linear")
    return Pipeline((mean(weight=weights if fair else 1.0, normalize=True),))


def averaging(tensors: Tensors) -> str:
    """What the plan says about them."""
    return (
        f"{tensors} {tensors['holds|hold']} running statistics: averaged over the models, whatever the method (a rule "
        "that names them, or exclude, changes that)"
    )
