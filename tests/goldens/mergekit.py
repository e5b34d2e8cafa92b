"""mergekit's YAML, as far as the golden cases go: every output tensor with the native call that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML

from weightsmith.core.keys import layer_of

Config = Mapping[str, Any]
Stages = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
MISSING = object()


@dataclass(frozen=True)
class Call:
    """One native merge: (stage, parameters) pairs, experts, base."""

    stages: Stages
    experts: tuple[str, ...]
    base: str | None = None


@dataclass(frozen=True)
class Output:
    """One output tensor: its name, the tensor each model gives for it, and the call."""

    name: str
    sources: Mapping[str, str]
    call: Call


def read(text: str) -> dict[str, Any]:
    return dict(YAML(typ="safe").load(text))


def outputs(config: Config, names: Sequence[str], layers: int) -> Iterator[Output]:
    """Go through the output model tensor by tensor.  `names`: one input's tensors, `layers` its block count."""
    slices = config.get("slices") or [{"sources": [dict(m, layer_range=[0, layers]) for m in config["models"]]}]
    inside = [n for n in names if layer_of(n)]
    for name in names:
        if not layer_of(name):
            part = slices[0] if "embed" in name else slices[-1]
            yield _output(config, part, name, {}, 0.0)
    block = 0
    for part in slices:
        length = part["sources"][0]["layer_range"][1] - part["sources"][0]["layer_range"][0]
        for index in range(length):
            place = index / (length - 1) if length > 1 else 1.0
            for name in inside:
                if layer_of(name)[1] == 0:  # type: ignore[index]
                    starts = {
                        s["model"]: name.replace(".0.", f".{s['layer_range'][0] + index}.") for s in part["sources"]
                    }
                    yield _output(config, part, name.replace(".0.", f".{block}."), starts, place)
            block += 1


def _output(config: Config, part: Config, name: str, sources: Mapping[str, str], place: float) -> Output:
    base = part.get("base_model", config.get("base_model"))
    listed = [s["model"] for s in part["sources"]]
    inputs = listed + ([base] if base is not None and base not in listed else [])
    source_of = {m: sources.get(m) or next(iter(sources.values()), name) for m in inputs}
    levels = {
        s["model"]: [s.get("parameters"), part.get("parameters"), config.get("parameters")] for s in part["sources"]
    }

    def one(parameter: str, model: str, default: Any = MISSING) -> Any:
        """A per-model parameter: source, slice, global, default; filters read that model's tensor name."""
        return _resolve(parameter, levels.get(model, [config.get("parameters")]), source_of[model], place, default)

    def shared(parameter: str, default: Any = MISSING) -> Any:
        return _resolve(parameter, [part.get("parameters"), config.get("parameters")], name, place, default)

    return Output(name, source_of, METHODS[config["merge_method"]](inputs, base, one, shared))


def _resolve(parameter: str, levels: Sequence[Config | None], tensor: str, place: float, default: Any) -> Any:
    for level in levels:
        if level and parameter in level:
            found = _value(level[parameter], tensor, place)
            if found is not MISSING:
                return found
    assert default is not MISSING, f"{parameter} is required for {tensor}"
    return default


def _value(value: Any, tensor: str, place: float) -> Any:
    """A scalar, a gradient, or the first {filter, value} whose filter is a part of the tensor's name."""
    if not isinstance(value, list):
        return value
    if all(isinstance(v, dict) for v in value):
        for entry in value:
            if entry.get("filter") in (None, "*") or entry["filter"] in tensor:
                return _value(entry["value"], tensor, place)
        return MISSING
    if isinstance(value[0], (bool, str)):
        return value[int(place * (len(value) - 1))]
    left = min(int(place * (len(value) - 1)), max(len(value) - 2, 0))
    right = min(left + 1, len(value) - 1)
    share = place * (len(value) - 1) - left
    return value[left] * (1 - share) + value[right] * share


One = Callable[..., Any]


def _linear(inputs: Sequence[str], base: str | None, one: One, shared: One) -> Call:
    weights = tuple(float(one("weight", m)) for m in inputs)
    return Call((("linear", (("weight", weights), ("normalize", shared("normalize", True)))),), tuple(inputs))


def _passthrough(inputs: Sequence[str], base: str | None, one: One, shared: One) -> Call:
    (model,) = inputs
    scale = one("scale", model, None)
    return Call((("linear", (("weight", 1.0 if scale is None else float(scale)), ("normalize", False))),), (model,))


def _slerp(inputs: Sequence[str], base: str | None, one: One, shared: One) -> Call:
    (expert,) = (m for m in inputs if m != base)
    return Call((("slerp", (("t", float(shared("t"))),)),), (expert,), base)


def _deltas(sparsify: str | None, consensus: bool, normalize: bool, rescale: bool) -> Callable[..., Call]:
    """The family of task_arithmetic, ties, dare, della and breadcrumbs."""

    def call(inputs: Sequence[str], base: str | None, one: One, shared: One) -> Call:
        experts = tuple(m for m in inputs if m != base)
        weights = tuple(float(one("weight", m)) for m in experts)
        densities = tuple(min(float(one("density", m, 1.0)), 1.0) for m in experts)
        divide, scale = shared("normalize", normalize), float(shared("lambda", 1.0))
        again = shared("rescale", rescale)
        stages: list[tuple[str, tuple[tuple[str, Any], ...]]] = []
        if sparsify == "dare":
            stages.append(("dare", (("density", densities), ("rescale", again), ("rescale_rule", "l1"))))
        elif sparsify == "della":
            spans = tuple(float(one("epsilon", m, 0.15)) for m in experts)
            stages.append(("della", (("density", densities), ("epsilon", spans), ("rescale", again))))
        elif sparsify == "magnitude":
            stages.append(("magnitude", (("density", densities), ("rescale", again))))
        elif sparsify == "breadcrumbs":
            tops = tuple(float(one("gamma", m, 0.01)) for m in experts)
            stages.append(("breadcrumbs", (("density", densities), ("remove_top", tops), ("rescale", again))))
        if consensus:
            rules = (("density", 1.0), ("scope", "tensor"), ("zero_sign", "plus"))
            if stages[0] == ("magnitude", (("density", densities), ("rescale", False))):  # ties itself can trim
                stages, rules = [], (("density", densities), *rules[1:])
            how = (("weight", weights), ("lambda", scale), ("aggregate", "mean" if divide else "sum"))
            stages.append(("ties", rules + how))
        else:
            divide = divide and abs(sum(weights)) >= 1e-8  # there, weights that cancel are divided by 1
            stages.append(("task_arithmetic", (("weight", weights), ("lambda", scale), ("normalize", divide))))
        return Call(tuple(stages), experts, base)

    return call


def _plain(
    method: str, shared_defaults: Mapping[str, Any], weights: bool = False, base_too: bool = False, **rename: str
) -> Callable[..., Call]:
    """A method of the same name: its parameters by ours (`rename`: ours -> theirs), the base as base or as input."""

    def call(inputs: Sequence[str], base: str | None, one: One, shared: One) -> Call:
        experts = tuple(inputs) if base_too else tuple(m for m in inputs if m != base)
        given = {n: shared(rename.get(n, n), default) for n, default in shared_defaults.items()}
        if weights:
            given["weight"] = tuple(float(one("weight", m)) for m in experts)
        return Call(((method, tuple(given.items())),), experts, None if base_too else base)

    return call


METHODS: Mapping[str, Callable[..., Call]] = {
    "linear": _linear,
    "passthrough": _passthrough,
    "slerp": _slerp,
    "task_arithmetic": _deltas(None, False, False, False),
    "ties": _deltas("magnitude", True, True, False),
    "dare_linear": _deltas("dare", False, False, True),
    "dare_ties": _deltas("dare", True, False, True),
    "della": _deltas("della", True, True, True),
    "della_linear": _deltas("della", False, False, True),
    "breadcrumbs": _deltas("breadcrumbs", False, False, False),
    "breadcrumbs_ties": _deltas("breadcrumbs", True, False, False),
    "arcee_fusion": _plain("arcee_fusion", {}),
    "karcher": _plain("karcher", {"max_iter": 10, "tol": 1e-5}, base_too=True),
    "model_stock": _plain("model_stock", {"filter_wise": False}),
    "multislerp": _plain("multislerp", {"normalize": True, "eps": 1e-8}, weights=True, normalize="normalize_weights"),
    "nearswap": _plain("nearswap", {"t": MISSING}),
    "nuslerp": _plain(
        "nuslerp",
        {"flatten": True, "row_wise": False},
        weights=True,
        flatten="nuslerp_flatten",
        row_wise="nuslerp_row_wise",
    ),
    "ram": _plain("ram", {"epsilon": 1e-5}),
    "ramplus_tl": _plain("ramplus_tl", {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
    "sce": _plain("sce", {"select_topk": 1.0}),
}
