"""Running statistics (BatchNorm's mean and variance): averaged by default, whatever the method.

A method that drops changes, or goes beyond the models, makes variances negative and the model's outputs NaN.
"""

from __future__ import annotations

from typing import Any

from weightsmith.core.method import Pipeline, registry
from weightsmith.core.problem import Tensors

__all__ = ["averaged", "averaging"]


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
