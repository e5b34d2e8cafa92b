"""mergekit's 20 methods: what their parameters are called there, and the native stages that do the same.

Facts about release 0.1.5, by its documentation and by what it computes (tests/goldens/cases/mergekit-*).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["METHODS", "REQUIRED", "Known", "Setting"]

REQUIRED = object()
"""Default of a parameter that must be given."""

BOTH = "both"
"""Scope of a parameter that every input has, the base too."""
MODEL = "model"
"""Scope of a parameter that every input but the base has."""
SHARED = "shared"
"""Scope of a parameter that the merge has once."""


@dataclass(frozen=True)
class Setting:
    """One parameter of one of mergekit's methods.

    native    the parameter it becomes; '' where it changes nothing in the result
    default   what mergekit takes where it is not given; None where that is the native default too
    convert   mergekit's value -> the native one
    """

    scope: str
    native: str
    default: Any = None
    kind: type = float
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Known:
    """One of mergekit's methods.

    base      'required', 'optional', or 'counted': a base model is one more input like the others
    stages    settings, as native parameters set by whatever level -> the native method or pipeline
    """

    settings: Mapping[str, Setting]
    stages: Callable[[Mapping[str, Any]], list[Any]]
    base: str = "required"


def _one(name: str, **fixed: Any) -> Callable[[Mapping[str, Any]], list[Any]]:
    return lambda given: [{name: fixed} if fixed else name]


def _flag(default: bool | None = None, native: str = "", **more: Any) -> Setting:
    return Setting(SHARED, native, default, bool, **more)


_INT8 = {"int8_mask": _flag()}
_WEIGHT = Setting(MODEL, "weight", REQUIRED)
_SCALE = {"lambda": Setting(SHARED, "lambda")}


def _aggregate(normalize: bool) -> str:
    return "mean" if normalize else "sum"


def _ties(given: Mapping[str, Any]) -> list[Any]:
    """`ties` trims by itself, unless the trimmed task vectors are to be scaled up."""
    if given.get("rescale", False) is False:
        return [{"ties": {"scope": "tensor", "zero_sign": "plus"}}]
    return ["magnitude", _VOTE]


_VOTE = {"ties": {"density": 1.0, "scope": "tensor", "zero_sign": "plus"}}


def _sparse(sparsifier: Any, *, vote: bool, normalize: bool, rescale: bool, **more: Setting) -> Known:
    """Filter, then a plain sum or a vote by signs: the family of dare, della and breadcrumbs."""
    divided = _flag(normalize, "aggregate", convert=_aggregate) if vote else _flag(normalize, "normalize")
    settings = {
        "weight": _WEIGHT,
        "density": Setting(MODEL, "density", 1.0),
        "normalize": divided,
        "rescale": _flag(rescale, "rescale"),
        **_SCALE,
        **_INT8,
        **more,
    }
    return Known(settings, lambda given: [sparsifier, _VOTE if vote else "task_arithmetic"])


_DARE = {"dare": {"rescale_rule": "l1"}}
_DELLA = {"della": {"rescale_rule": "l1"}}
_EPSILON = {"epsilon": Setting(MODEL, "epsilon", 0.15)}
_GAMMA = {"gamma": Setting(MODEL, "remove_top", 0.01)}

METHODS: Mapping[str, Known] = {
    "linear": Known(
        {"weight": Setting(BOTH, "weight", REQUIRED), "normalize": _flag(native="normalize")}, _one("linear"), "counted"
    ),
    "passthrough": Known({"scale": Setting(BOTH, "scale")}, _one("passthrough"), "counted"),
    "slerp": Known({"t": Setting(SHARED, "t", REQUIRED)}, _one("slerp")),
    "nuslerp": Known(
        {"weight": _WEIGHT, "nuslerp_flatten": _flag(native="flatten"), "nuslerp_row_wise": _flag(native="row_wise")},
        _one("nuslerp"),
        "optional",
    ),
    "multislerp": Known(
        {"weight": _WEIGHT, "normalize_weights": _flag(native="normalize"), "eps": Setting(SHARED, "eps")},
        _one("multislerp"),
        "optional",
    ),
    "karcher": Known(
        {"max_iter": Setting(SHARED, "max_iter", kind=int), "tol": Setting(SHARED, "tol")}, _one("karcher"), "counted"
    ),
    "task_arithmetic": Known(
        {"weight": _WEIGHT, "normalize": _flag(native="normalize"), **_SCALE, **_INT8}, _one("task_arithmetic")
    ),
    "ties": Known(
        {
            "weight": _WEIGHT,
            "density": Setting(MODEL, "density", 1.0),
            "normalize": _flag(True, "aggregate", convert=_aggregate),
            "rescale": _flag(native="rescale"),
            **_SCALE,
            **_INT8,
        },
        _ties,
    ),
    "dare_linear": _sparse(_DARE, vote=False, normalize=False, rescale=True),
    "dare_ties": _sparse(_DARE, vote=True, normalize=False, rescale=True),
    "della_linear": _sparse(_DELLA, vote=False, normalize=False, rescale=True, **_EPSILON),
    "della": _sparse(_DELLA, vote=True, normalize=True, rescale=True, **_EPSILON),
    "breadcrumbs": _sparse("breadcrumbs", vote=False, normalize=False, rescale=False, **_GAMMA),
    "breadcrumbs_ties": _sparse("breadcrumbs", vote=True, normalize=False, rescale=False, **_GAMMA),
    "sce": Known({"select_topk": Setting(SHARED, "select_topk", 1.0), **_INT8}, _one("sce")),
    "ram": Known({"epsilon": Setting(SHARED, "epsilon")}, _one("ram")),
    "ramplus_tl": Known({n: Setting(SHARED, n) for n in ("epsilon", "r", "alpha")}, _one("ramplus_tl")),
    "model_stock": Known({"filter_wise": _flag(native="filter_wise")}, _one("model_stock")),
    "nearswap": Known({"t": Setting(SHARED, "t", REQUIRED)}, _one("nearswap")),
    "arcee_fusion": Known({}, _one("arcee_fusion")),
}
