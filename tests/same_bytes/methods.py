"""Cases of merges in memory: every registered method and filter, its parameters, pipelines and recipe options."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import weightsmith as ws

from .cases import Case
from .models import AWKWARD, BFLOAT16, LLAMA, MIXED, SPECIAL, VARIED, Model, family, fisher, gram
from .payload import Part, of_tensors

Parameters = Mapping[str, Any]

FEW = {
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.1.norm.weight": (9,),
    "model.layers.1.mlp.down_proj.weight": (8, 12),
    "one_column.weight": (9, 1),
}
SMALL = {
    "model.embed_tokens.weight": (13, 8),
    "model.layers.0.mlp.up_proj.weight": (5, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 5),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.norm.weight": (9,),
    "one_row.weight": (1, 6),
    "scalar": (),
}


@functools.cache
def models(kind: str) -> tuple[Model, dict[str, Model]]:
    """The sets of tensors that names of cases speak of."""
    match kind:
        case "plain":  # float32, with every value that breaks careless arithmetic
            return family(3, LLAMA, special=SPECIAL)
        case "mixed":  # stored in turn in float32, bfloat16 and float16, one expert all in float32; awkward shapes
            return family(3, {**LLAMA, **AWKWARD}, MIXED, special=("same", "cancel", "negative_zero"), wider=True)
        case "varied":  # the same with fewer tensors, for the many values of parameters
            return family(3, VARIED, MIXED, special=("cancel", "negative_zero"), wider=True)
        case "apart":  # the same, and no two experts have their directions in common: which count is then arbitrary
            return family(3, VARIED, MIXED, special=("negative_zero",), wider=True)
        case "lone":
            return family(1, {**VARIED, **FEW}, MIXED, special=("tiny", "negative_zero"))
        case "few":  # for what takes long
            return family(3, FEW, BFLOAT16)
        case "two":
            return family(2, LLAMA, BFLOAT16)
        case "one":
            return family(1, {**LLAMA, **AWKWARD}, MIXED, special=SPECIAL)
        case "twelve":
            return family(12, SMALL, BFLOAT16)
        case "large":  # more rows than a block has, more entries than the kernels sample
            return family(3, {"model.layers.0.mlp.up_proj.weight": (523, 521)}, BFLOAT16)
        case "wide":
            return family(2, {"model.layers.0.mlp.up_proj.weight": (272, 300)})
        case "odd_dtypes":
            wide = (torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.bfloat16)
            return family(2, LLAMA, wide)
    raise KeyError(kind)


def merged(kind: str, method: Any, *, base: bool = True, statistics: str = "", **options: Any) -> list[Part]:
    """One merge of a set of tensors."""
    start, experts = models(kind)
    made = {"": None, "fisher": fisher, "gram": gram, "gram_rows": functools.partial(gram, rows=True)}
    stats = {**made, "second_moment": functools.partial(fisher, called="second_moment")}[statistics]
    given = {} if stats is None else {"stats": stats(experts)}
    found = ws.merge(experts, method, base=start if base else None, threads=1, **given, **options)
    assert isinstance(found, dict)
    return of_tensors(found)


def each(*values: Any) -> dict[str, Any]:
    """One value for each of the experts e0, e1, ..."""
    return {f"e{i}": value for i, value in enumerate(values)}


ODD, TWO = each(0.3, 0.8, 0.55), each(0.4, 0.9)
RAMP = [0.2, 1.0, 0.6]

# --- what is merged with default parameters -------------------------------------------------------

USUAL = ("plain", "mixed", "two", "twelve")
SETS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("nearswap", "passthrough", "slerp"), ("one",)),
    "arcee_fusion": ("lone",),
    "nuslerp": ("two",),
    **dict.fromkeys(("optmerge", "wudi"), ("varied", "few")),
    "doge": ("apart", "few"),
    "pcb": ("varied", "plain", "few"),
}
"""Of methods that take fewer experts, or long."""

KERNELS = (
    "breadcrumbs", "consensus", "dare", "karcher", "linear", "magnitude", "model_stock", "multislerp", "nuslerp",
    "passthrough", "slerp", "task_arithmetic", "ties",
)  # fmt: skip
"""Of the other methods the parameters are tried with the kernels alone: their merges are made in torch anyway."""

AFTER = ("consensus", "lines")
"""Filters of the merged task vector."""

GIVEN: Mapping[str, Parameters] = {
    "mwa": {"value": {f"e{i}": 1.5 + i % 3 for i in range(12)}},
    "soup": {"score": {f"e{i}": (7 * i) % 5 for i in range(12)}, "size": 2},
}
"""Parameters without which a method does nothing, or nothing of interest."""

# --- parameters that change what is done ----------------------------------------------------------

VARIANTS: Mapping[str, tuple[Parameters, ...]] = {
    "aswudi": (
        {"rule": "cumulative", "share": 0.8}, {"rule": "stable_rank"}, {"rule": "entropy"}, {"rule": "participation"},
        {"rule": "gavish_donoho"}, {"rule": "none", "init": "zero"}, {"time": 30.0, "init": "mean"}, {"scaling": 0.5},
        {"min_rank": 3, "min_eigenvalue": 0.01},
    ),
    "breadcrumbs": (
        {"density": 0.6, "remove_top": 0.1}, {"density": 0.6, "remove_top": 0.1, "rescale": True},
        {"scope": "row", "density": 0.6}, {"scope": "row", "remove_top": 0.1, "remove_first": False},
        {"remove_top": 0.0}, {"density": ODD, "remove_top": each(0.0, 0.1, 0.2)}, {"density": 1.0, "remove_top": 0.3},
    ),
    "consensus": (
        {"k": 0}, {"k": 1, "lambda": 0.4}, {"k": 3, "tall_mask_lambda": 0.2}, {"tall_mask_lambda": ODD},
    ),
    "dare": (
        {"density": 0.1}, {"rescale": False}, {"rescale_rule": "l1"}, {"density": ODD},
        {"density": ODD, "rescale_rule": "l1"}, {"density": 1.0}, {"density": RAMP},
    ),
    "della": (
        {"density": 0.3, "epsilon": 0.2}, {"rescale": False}, {"rescale_rule": "expectation"}, {"epsilon": 0.0},
        {"density": ODD, "epsilon": each(0.1, 0.0, 0.2)},
    ),
    "doge": (
        {"iters": 0}, {"iters": 5, "lr": 0.01}, {"iters": 5, "subspace": 2, "density": 1.0},
        {"iters": 5, "embeddings": True, "lambda": 0.3},
    ),
    "emr": ({"lambda": 0.5},),
    "ffg": (
        {"density": 0.1}, {"density": ODD}, {"metric": "magnitude"}, {"threshold": 1e-6}, {"density": 1.0},
        {"threshold": each(1e-7, 1e-6, 1e-5)},
    ),
    "fisher": (
        {"weight": ODD}, {"normalize": False}, {"floor_mode": "max"}, {"floor_mode": "max_target"}, {"floor": 0.0},
        {"floor": 0.01, "floor_mode": "max", "normalize": False},
    ),
    "iso_c": ({"scaling": 0.5}, {"rank_tol": 0.1}, {"solver": "iterate"}),
    "iso_cts": ({"scaling": 0.5}, {"common_space_fraction": 0.0}, {"common_space_fraction": 1.0}),
    "karcher": ({"max_iter": 0}, {"max_iter": 1}, {"weight": ODD}, {"tol": 0.1}),
    "knots": (
        {"density": 0.4}, {"density": ODD, "scaling": each(0.5, 1.0, 2.0)}, {"rule": "mean"}, {"sign": "count"},
        {"aggregate": "sum", "density": 0.4}, {"drop": 0.4}, {"shared": "right", "density": 0.4},
    ),
    "linear": ({"weight": ODD}, {"normalize": False, "weight": 0.4}, {"weight": each(1.0, -0.3, 0.5)},
               {"weight": RAMP}),
    "lines": ({"alpha": 0.3, "beta": 0.5}, {"alpha": 0.5}, {"beta": 1.0}, {"outside": "depth"}),
    "magmax": ({"lambda": 0.6},),
    "magnitude": ({"density": 0.2}, {"rescale": True}, {"density": ODD}, {"density": 1.0}, {"density": 0.001}),
    "model_stock": ({"filter_wise": True},),
    "multislerp": ({"weight": ODD}, {"normalize": False, "weight": 0.4}, {"eps": 0.0}, {"eps": 0.5}),
    "mwa": tuple(
        {"value": each(1.5, 0.7, 2.0), **more}
        for more in (
            {"penalty": 0.0}, {"penalty": 3.0, "metric": "score"}, {"metric": "steps"}, {"rule": "softmax"},
            {"rule": "rank"},
        )
    ),
    "opcm": ({"alpha": 0.0}, {"alpha": 0.9}, {"merged": 2, "lambda": 1.5}),
    "optmerge": (
        {"iters": 0}, {"iters": 4, "optimizer": "adam"}, {"iters": 4, "optimizer": "sgd", "momentum": 0.5},
        {"iters": 4, "variant": "lora"}, {"iters": 4, "init": "mean", "scaling": 0.5}, {"iters": 4, "lr": 0.001},
    ),
    "ota": (
        {"weight": ODD}, {"power": 1.0}, {"epsilon": 1e-8, "epsilon_mode": "absolute"}, {"normalize": "mean"},
        {"epsilon": 0.0, "fallback": "mean"},
    ),
    "pcb": (
        {"variant": "es"}, {"variant": "vision"}, {"variant": "paper"}, {"ratio": 0.5, "clip": 0.05},
        {"lambda": ODD}, {"scope": "tensor"}, {"scope": "tensor", "variant": "paper"}, {"ratio": 1.0, "clip": 0.0},
    ),
    "r_tsvm": (
        {"weighting": "suppress", "outlier_sigma": 1.0}, {"weighting": "none"},
        {"sparsity_eps": 0.01, "rank_gamma": 0.3},
        {"rank_base": 0.5, "rank_min": 2, "scaling": 0.5}, {"weight_cap": 1.2, "outlier_sigma": 1.0},
    ),
    "ram": ({"epsilon": 0.05}, {"epsilon": 0.0}),
    "ramplus_tl": ({"epsilon": 0.05}, {"r": 0.5, "alpha": 1.0}, {"alpha": 0.0}),
    "regmean": ({"alpha": 0.5}, {"weight": ODD}, {"ridge": 0.01}, {"alpha": 0.0}, {"alpha": 1.0, "ridge": 0.1}),
    "sce": ({"select_topk": 0.3}, {"select_topk": 0.0}, {"equal_below": 0.1}),
    "soup": (
        {"score": each(0.3, 0.5, 0.4), "size": 0}, {"score": each(0.3, 0.5, 0.4), "size": 1},
        {"score": each(0.3, 0.2, 0.3), "size": 1},
    ),
    "swudi": (
        {"time": 0.0}, {"time": "inf"}, {"rank_ratio": 1.0, "init": "mean"}, {"rank_ratio": 0.2, "scaling": 0.5},
        {"min_eigenvalue": 0.1},
    ),
    "task_arithmetic": (
        {"lambda": 0.4}, {"weight": ODD}, {"weight": ODD, "normalize": True, "lambda": 0.7},
        {"weight": each(1, -1, 0.5)},
        {"weight": each([0.0, 1.0], 0.5, RAMP)}, {"weight": 0.0},
    ),
    "ties": (
        {"density": 1.0}, {"density": 0.5, "scope": "tensor"}, {"density": ODD}, {"density": ODD, "scope": "tensor"},
        {"weight": ODD, "lambda": 0.7}, {"sign": "count"}, {"sign": "count", "zero_sign": "minority"},
        {"sign": "normmass"}, {"sign": "normfrac", "scope": "tensor"},
        {"zero_sign": "minority", "density": 1.0}, {"zero_sign": "plus", "scope": "tensor"}, {"aggregate": "sum"},
        {"aggregate": "max"}, {"aggregate": "sum", "sign": "count", "density": 0.7, "scope": "tensor"},
        {"weight": each(1.0, -0.5, 2.0), "aggregate": "sum"}, {"density": 0.001}, {"density": RAMP, "scope": "tensor"},
    ),
    "tsvm": (
        {"scaling": 0.5}, {"scaling": ODD}, {"rank_fraction": 0.7}, {"orthogonalise": "svd"}, {"orthogonalise": "none"},
        {"beyond": "slices"}, {"beyond": "flatten"},
    ),
    "weight_matching": ({"weight": ODD},),
    "widen": (
        {"above_average_value_ratio": 0.5}, {"score_calibration_value": 0.3}, {"transpose_embeddings": False},
    ),
    "wudi": ({"iters": 0}, {"iters": 5, "lr": 0.001}, {"iters": 5, "scaling": 0.5}),
}  # fmt: skip
"""On the set 'varied'."""

FEW_VARIANTS: Mapping[str, tuple[str, tuple[Parameters, ...]]] = {
    "nearswap": ("one", ({"t": 0.05}, {"t": 0.0})),
    "nuslerp": (
        "two",
        ({"weight": TWO}, {"flatten": False}, {"flatten": False, "row_wise": True}, {"weight": TWO, "flatten": False}),
    ),
    "passthrough": ("one", ({"scale": 0.5}, {"scale": -2.0}, {"scale": RAMP})),
    "slerp": ("one", ({"t": 0.0}, {"t": 0.3}, {"t": 1.0}, {"t": RAMP})),
}

BASELESS = (
    "linear", "karcher", "multislerp", "soup", "mwa", "fisher", "ota", "regmean", "slerp", "nuslerp", "passthrough",
    "weight_matching", "keep",
)  # fmt: skip
"""Methods that do without a base."""

LARGE: tuple[Any, ...] = (
    "linear", "karcher", "multislerp", "model_stock", "pcb", "sce", "fisher",
    {"task_arithmetic": {"weight": ODD}}, {"ties": {"density": 0.3}}, {"ties": {"density": ODD, "scope": "tensor"}},
    {"ties": {"density": 0.2, "scope": "tensor", "sign": "count", "aggregate": "max"}},
    ({"magnitude": {"density": 0.3, "rescale": True}}, "task_arithmetic"), ({"magnitude": {"density": ODD}}, "ties"),
    ({"breadcrumbs": {"density": 0.7, "remove_top": 0.05}}, "task_arithmetic"),
    ({"breadcrumbs": {"density": 0.7, "rescale": True}}, "ties"),
    ({"breadcrumbs": {"scope": "row"}}, "task_arithmetic"), ("dare", "ties"), ("dare", "linear"),
    ({"dare": {"rescale_rule": "l1"}}, "task_arithmetic"), ("della", "ties"), ("ties", "consensus"),
    ("della", "task_arithmetic"), ({"della": {"epsilon": 0.4}}, {"ties": {"scope": "tensor", "density": 0.3}}),
    ("dare", {"magnitude": {"density": 0.3}}, "ties"), ("breadcrumbs", "della", {"ties": {"scope": "tensor"}}),
)  # fmt: skip

WIDE: tuple[Any, ...] = (
    "tsvm", "iso_c", {"iso_c": {"solver": "iterate"}}, "iso_cts", "r_tsvm", "knots", "opcm", {"wudi": {"iters": 2}},
)  # fmt: skip
"""Decompositions that are made in float32, or in part, where a matrix is large."""

# --- pipelines ------------------------------------------------------------------------------------

PARTNERS = (
    "task_arithmetic", {"ties": {"density": 1.0}}, {"ties": {"scope": "tensor", "density": 0.4}}, "linear", "emr",
    "magmax", "sce", "karcher", "iso_c", "model_stock",
)  # fmt: skip
"""Methods behind (or, of filters of the merged task vector, before) every filter."""

CHAINS: tuple[tuple[Any, ...], ...] = (
    ("dare", "ties", "lines"),
    ("dare", "magnitude", "ties"),
    ("magnitude", "dare", "task_arithmetic"),
    ({"magnitude": {"density": 0.7, "rescale": True}}, {"magnitude": {"density": 0.5}}, "linear"),
    ("breadcrumbs", "dare", "ties"),
    ("della", "ties", "consensus"),
    ("della", "dare", {"ties": {"sign": "count"}}),
    ("breadcrumbs", "task_arithmetic", "consensus", "lines"),
    ("task_arithmetic", "lines", "consensus"),
    ("dare", "tsvm", "lines"),
    ("magnitude", "iso_cts"),
    ("dare", "wudi"),
    ("ties", "magnitude"),
    ("task_arithmetic", {"dare": {"density": 0.5}}),
    ("dare", "task_arithmetic", {"magnitude": {"density": 0.3}}),
    ({"dare": {"density": 0.8}}, {"ties": {"density": 1.0, "lambda": 1.5}}),
    ({"dare": {"density": ODD}}, {"ties": {"density": 0.5, "weight": ODD, "aggregate": "sum"}}),
    ({"breadcrumbs": {"scope": "row", "density": 0.8}}, {"ties": {"density": 1.0, "aggregate": "sum"}}),
    ({"magnitude": {"density": ODD}}, {"task_arithmetic": {"weight": ODD, "lambda": 0.5}}),
    ("emr", {"lines": {"alpha": 0.4, "beta": 0.8}}),
    ("ffg", "ota"),
    ({"ffg": {"density": ODD}}, {"ota": {"fallback": "mean"}}),
)

RULES: list[dict[str, Any]] = [
    {"match": "*norm*", "method": "keep"},
    {"role": ["up", "gate"], "layers": [0, 2], "parameters": {"density": 0.5}},
    {"match": ["lm_head*", "*embed*"], "method": "average"},
    {"match": "*.o_proj.*", "method": [{"dare": {"density": 0.4}}, "task_arithmetic"]},
    {"layers": "outside", "method": {"task_arithmetic": {"lambda": 0.3}}},
]

OPTIONS: Mapping[str, tuple[str, Any, Mapping[str, Any]]] = {
    "rules": ("mixed", "ties", {"rules": RULES}),
    "rules of cases": ("plain", "task_arithmetic", {"weight": [{"match": "*mlp*", "value": 0.3}, 0.5]}),
    "cases by model": ("mixed", "linear", {"weight": {"e1": [{"role": "q", "value": RAMP}, 0.7]}}),
    "exclude": ("mixed", "ties", {"exclude": ["*embed*", "*.1.*"]}),
    "exclude without a base": ("mixed", "linear", {"exclude": ["*norm*"], "base": False}),
    "seed": ("varied", ("dare", "ties"), {"seed": 12345}),
    "dtype float32": ("mixed", "ties", {"dtype": "float32"}),
    "dtype bfloat16": ("plain", "linear", {"dtype": "bfloat16"}),
    "dtype bfloat16, pipeline": ("few", ({"magnitude": {"rescale": True}}, "ties"), {"dtype": "bfloat16"}),
    "dtype float16": ("two", ("dare", "task_arithmetic"), {"dtype": "float16"}),
    "dtype float64": ("two", "task_arithmetic", {"dtype": "float64"}),
    "dtype float8": ("two", "ties", {"dtype": "float8_e4m3fn"}),
    "nonfinite allow": ("mixed", "ties", {"nonfinite": "allow"}),
    "odd dtypes, linear": ("odd_dtypes", "linear", {}),
    "odd dtypes, ties": ("odd_dtypes", "ties", {}),
    "odd dtypes, dare": ("odd_dtypes", ("dare", "task_arithmetic"), {}),
    "odd dtypes, tsvm": ("odd_dtypes", "tsvm", {}),
    "odd dtypes, model_stock": ("odd_dtypes", "model_stock", {}),
    "odd dtypes to bfloat16": ("odd_dtypes", "karcher", {"dtype": "bfloat16"}),
}


def cases() -> Iterator[Case]:
    """Every merge in memory; a method that is registered later gets cases with its defaults."""
    stages = ws.registered()
    for name, stage in stages.items():
        if issubclass(stage, ws.Filter):
            yield from _filter(name)
        elif issubclass(stage, ws.Method):
            yield from _method(name)
    for chain in CHAINS:
        yield _case(f"chain {_words(chain)}", "few", list(chain))
    for method in LARGE:
        listed = list(method) if isinstance(method, tuple) else method
        yield _case(f"large {_words(method)}", "large", listed)
    for method in WIDE:
        yield _case(f"wide {_words(method)}", "wide", method, plain=False)
    for name, (kind, method, options) in OPTIONS.items():
        yield _case(f"option {name}", kind, list(method) if isinstance(method, tuple) else method, **options)


def _method(name: str) -> Iterator[Case]:
    given = GIVEN.get(name)
    for kind in SETS.get(name, USUAL):
        yield _case(f"{name} default", kind, _spec(name, _held(given, kind)))
    for parameters in VARIANTS.get(name, ()):
        kind = "apart" if name == "doge" else "varied"
        yield _case(f"{name} {_words(parameters)}", kind, _spec(name, parameters), name in KERNELS)
    kind, few = FEW_VARIANTS.get(name, ("", ()))
    for parameters in few:
        yield _case(f"{name} {_words(parameters)}", kind, _spec(name, parameters))
    if name in BASELESS:
        kinds = ("two",) if name in ("slerp", "nuslerp") else ("one",) if name == "passthrough" else ("plain", "mixed")
        for kind in kinds:
            spec = _spec(name, _held(given, kind))
            yield _case(f"{name} without a base", kind, spec, base=False)
    if name == "regmean":
        yield _case("regmean transposed", "two", _spec(name, {"transposed": True}), statistics="gram_rows")


def _filter(name: str) -> Iterator[Case]:
    def pipeline(parameters: Parameters | None, partner: Any) -> list[Any]:
        parts = [_spec(name, parameters), partner]
        return parts[::-1] if name in AFTER else parts

    for partner in PARTNERS:
        yield _case(f"{name} with {_words(partner)}", "varied", pipeline(None, partner))
    yield _case(f"{name} with task_arithmetic", "plain", pipeline(None, "task_arithmetic"))
    for kind in ("two", "twelve") if name != "lines" else ("two",):
        yield _case(f"{name} with task_arithmetic", kind, pipeline(None, "task_arithmetic"))
    yield _case(f"{name} with ties", "few", pipeline(None, "ties"))
    if name != "consensus":
        yield _case(f"{name} with passthrough", "one", pipeline(None, "passthrough"))
    for parameters in VARIANTS.get(name, ()):
        kernels = name in KERNELS
        yield _case(f"{name} {_words(parameters)}", "varied", pipeline(parameters, "task_arithmetic"), kernels)
        with_ties = pipeline(parameters, {"ties": {"density": 0.6}})
        yield _case(f"{name} {_words(parameters)} with ties", "few", with_ties, kernels)


def _case(name: str, kind: str, method: Any, plain: bool = True, **options: Any) -> Case:
    options.setdefault("statistics", _need(method))
    return Case(f"{name} / {kind}", lambda _: merged(kind, method, **options), plain)


def _spec(name: str, parameters: Parameters | None) -> Any:
    return {name: dict(parameters)} if parameters else name


def _held(parameters: Parameters | None, kind: str) -> Parameters | None:
    """Only the values of experts that the set has."""
    known = models(kind)[1]
    if parameters is None:
        return None
    return {
        key: {name: v for name, v in value.items() if name in known} if isinstance(value, dict) else value
        for key, value in parameters.items()
    }


def _need(method: Any) -> str:
    """The statistic that a method or any stage of a pipeline asks for."""
    if isinstance(method, (tuple, list)):
        return max(map(_need, method), default="")
    name = next(iter(method)) if isinstance(method, dict) else method
    return {"fisher": "fisher", "ffg": "second_moment", "ota": "second_moment", "regmean": "gram"}.get(name, "")


def _words(value: Any) -> str:
    """Stages and parameters as a case's name has them."""
    if isinstance(value, (tuple, list)):
        return " > ".join(map(_words, value)) if any(isinstance(v, (str, dict)) for v in value) else str(list(value))
    if not isinstance(value, dict):
        return str(value)
    if set(value) <= {f"e{i}" for i in range(12)}:
        return "{" + ",".join(_words(v) for v in value.values()) + "}"
    return " ".join(f"{k}({_words(v)})" if isinstance(v, dict) and not set(v) <= {f"e{i}" for i in range(12)}
                    else f"{k}={_words(v)}" for k, v in value.items())  # fmt: skip
