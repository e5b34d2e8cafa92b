"""How each task is carried out: the one place that asks whether the kernels do it."""

from __future__ import annotations

import os
from importlib.util import find_spec

from weightsmith.core.keys import Key
from weightsmith.core.method import Grain, Pipeline
from weightsmith.core.task import Way
from weightsmith.inputs.opened import Inputs
from weightsmith.kernels.stored import READ, WRITTEN

__all__ = ["kernels_there", "way_of"]

EXACT = 1 << 24
"""Numbers up to here are exact as float32."""


def way_of(key: Key, pipeline: Pipeline | None, inputs: Inputs, *, kernels: bool, nonfinite: str) -> Way:
    """The way of a tensor; `kernels`: whether the run has them (not with a device, nor WEIGHTSMITH_KERNELS=0)."""
    if pipeline is None:
        return Way.COPY
    if pipeline.grain is Grain.GROUP:
        return Way.GROUP
    if pipeline.codec is not None:
        return Way.CODEC
    if kernels and nonfinite != "allow" and _in_kernels(key, pipeline, inputs):
        return Way.KERNEL
    return Way.ROWS if pipeline.grain is Grain.ELEMENT else Way.WHOLE


def _in_kernels(key: Key, pipeline: Pipeline, inputs: Inputs) -> bool:
    """Whether the kernels know the methods, write the output's dtype and read all dtypes that it is stored in."""
    program = pipeline.fused(len(inputs.experts))
    if program is None or key.dtype not in WRITTEN:
        return False
    if program.ranks and (not key.shape or max(key.shape) > EXACT):
        return False  # a single number is not a ranking, nor are ranks exact as float32 that long
    read = inputs.models if program.wants_base else tuple(inputs.experts.items())
    return all(s.key(key.name).dtype in READ and not s.computes(key.name) for _, s in read)


def kernels_there() -> bool:
    """Whether a run will find the kernels; nothing is compiled or loaded to tell."""
    return find_spec("numba") is not None and os.environ.get("WEIGHTSMITH_KERNELS") != "0"
