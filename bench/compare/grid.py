"""The configs that are compared: methods, parameters, filters, gradients, slices, dtypes; see `examples` for the rest.

In the texts BASE, A, B and C stand for the folders of a base and three experts, BASE16 ... for them in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["EQUALS", "NOISE", "Config", "cut", "grid", "models", "stack", "weighted"]


@dataclass(frozen=True)
class Config:
    """One config.

    random   masks are drawn, so that only the size of the change can be compared
    unlike   share of the entries that may differ by more than rounding, and why
    stores   the dtype in which mergekit writes the result whatever the config says; '' if it follows it
    """

    name: str
    text: str
    random: bool = False
    unlike: tuple[float, str] = (0.0, "")
    stores: str = ""


EQUALS = (0.03, "the cut falls among equally large changes")
NOISE = (0.03, "near the threshold, where float32 is noise")


def models(*entries: str) -> str:
    return "models:\n" + "\n".join(f"  - {{{entry}}}" for entry in entries)


def weighted(*weights: object, base: bool = False) -> str:
    listed = ["model: BASE"] if base else []
    return models(*listed, *(f"model: {m}, parameters: {{weight: {w}}}" for m, w in zip("ABC", weights, strict=False)))


def grid() -> Iterator[Config]:
    yield from _methods()
    yield from _values()
    yield from _slices()
    yield from _dtypes()


def _methods() -> Iterator[Config]:
    """Every method with its defaults and with other parameters."""
    deltas = "base_model: BASE"
    many = weighted(0.5, 0.3, -0.2, base=True)
    yield Config("linear", f"{weighted(1, 2, 0.5)}\nmerge_method: linear")
    yield Config(
        "linear, not normalized", f"{weighted(1, 2, 0.5)}\nmerge_method: linear\nparameters: {{normalize: false}}"
    )
    yield Config(
        "linear, base among the inputs",
        "models: [{model: A, parameters: {weight: 0.5}}]\nmerge_method: linear\nbase_model: BASE\n"
        "parameters: {weight: 2}",
    )
    for t in (0, 0.3, 1):
        yield Config(f"slerp, t {t}", f"{models('model: A')}\nmerge_method: slerp\n{deltas}\nparameters: {{t: {t}}}")
    two = weighted(0.3, 0.9)
    for flatten, rows in (("true", "false"), ("false", "false"), ("false", "true")):
        shared = f"parameters: {{nuslerp_flatten: {flatten}, nuslerp_row_wise: {rows}}}"
        yield Config(f"nuslerp, flatten {flatten}, row_wise {rows}", f"{two}\nmerge_method: nuslerp\n{shared}")
        yield Config(
            f"nuslerp on a base, flatten {flatten}, row_wise {rows}",
            f"{two}\nmerge_method: nuslerp\n{deltas}\n{shared}",
        )
    for base in ("", f"\n{deltas}"):
        where = " on a base" if base else ""
        yield Config(f"multislerp{where}", f"{weighted(1, 2, 0.5)}\nmerge_method: multislerp{base}")
        raw = "parameters: {normalize_weights: false}"
        yield Config(
            f"multislerp{where}, weights as they are",
            f"{weighted(1, 2, 0.5)}\nmerge_method: multislerp{base}\n{raw}",
        )
        yield Config(f"karcher{where}", f"{models('model: A', 'model: B', 'model: C')}\nmerge_method: karcher{base}")
    yield Config(
        "karcher, one step",
        f"{models('model: A', 'model: B')}\nmerge_method: karcher\nparameters: {{max_iter: 1, tol: 1e-5}}",
    )
    for extra in ("", "lambda: 0.4", "normalize: true, lambda: 0.4"):
        yield Config(
            f"task_arithmetic {extra}", f"{many}\nmerge_method: task_arithmetic\n{deltas}\nparameters: {{{extra}}}"
        )
    for extra in (
        "density: 0.3",
        "density: 0.3, normalize: false",
        "density: 0.3, rescale: true, lambda: 0.7",
        "int8_mask: true",
    ):
        yield Config(f"ties, {extra}", f"{many}\nmerge_method: ties\n{deltas}\nparameters: {{{extra}}}")
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        for extra in (
            "density: 0.6",
            "density: 0.6, gamma: 0.1",
            "density: 0.6, gamma: 0.05, rescale: true",
            "density: 0.6, normalize: true",
        ):
            text = f"{weighted(0.5, 0.3, 0.4, base=True)}\nmerge_method: {method}\n{deltas}\nparameters: {{{extra}}}"
            yield Config(f"{method}, {extra}", text)
    for method in ("dare_linear", "dare_ties", "della", "della_linear"):
        yield Config(f"{method}, density 1", f"{many}\nmerge_method: {method}\n{deltas}")
        other = "false" if method == "della" else "true"
        yield Config(
            f"{method}, density 1, normalize flipped",
            f"{many}\nmerge_method: {method}\n{deltas}\nparameters: {{normalize: {other}}}",
        )
        for extra in ("density: 0.5", "density: 0.5, rescale: false"):
            text = f"{weighted(0.5, 0.3, 0.2, base=True)}\nmerge_method: {method}\n{deltas}\nparameters: {{{extra}}}"
            yield Config(f"{method}, {extra}", text, random=True)
    three = models("model: BASE", "model: A", "model: B", "model: C")
    for topk in (1.0, 0.3):
        yield Config(
            f"sce, select_topk {topk}", f"{three}\nmerge_method: sce\n{deltas}\nparameters: {{select_topk: {topk}}}"
        )
    for extra in ("", "epsilon: 1e-3"):
        yield Config(f"ram {extra}", f"{three}\nmerge_method: ram\n{deltas}\nparameters: {{{extra}}}")
        yield Config(f"ramplus_tl {extra}", f"{three}\nmerge_method: ramplus_tl\n{deltas}\nparameters: {{{extra}}}")
    yield Config(
        "ramplus_tl r 0.5, alpha 1",
        f"{three}\nmerge_method: ramplus_tl\n{deltas}\nparameters: {{epsilon: 1e-3, r: 0.5, alpha: 1}}",
    )
    for wise in ("false", "true"):
        yield Config(
            f"model_stock, filter_wise {wise}",
            f"{three}\nmerge_method: model_stock\n{deltas}\nparameters: {{filter_wise: {wise}}}",
        )
    yield Config("nearswap", f"{models('model: A')}\nmerge_method: nearswap\n{deltas}\nparameters: {{t: 0.0005}}")
    yield Config("arcee_fusion", f"{models('model: A')}\nmerge_method: arcee_fusion\n{deltas}", unlike=NOISE)
    yield Config("passthrough", f"{models('model: A')}\nmerge_method: passthrough")
    yield Config("passthrough, scale", f"{models('model: A')}\nmerge_method: passthrough\nparameters: {{scale: 0.5}}")


def _values() -> Iterator[Config]:
    """Filters, gradients and levels."""
    for name, value in {
        "gradient": "[0, 0.5, 1]",
        "gradient of two": "[0.1, 0.9]",
        "gradient of one": "[0.4]",
        "filter": "[{filter: self_attn, value: 0.2}, {value: 0.7}]",
        "filters and gradients": "[{filter: self_attn, value: [0, 0.5, 0.3]}, {filter: mlp, value: [1, 0.2]}, "
        "{value: 0.5}]",
        "filter of one layer": "[{filter: layers.1., value: 1}, {filter: '*', value: 0.25}]",
        "filters for all names": "[{filter: layers, value: 0.2}, {filter: embed, value: 0.4}, "
        "{filter: norm, value: 0.6}]",
        "one filter, not in a list": "{filter: '*', value: 0.3}",
        "numbers in quotes": "['1e-1', '0.5']",
    }.items():
        yield Config(
            f"slerp, {name}",
            f"{models('model: A')}\nmerge_method: slerp\nbase_model: BASE\nparameters: {{t: {value}}}",
        )
        text = (
            f"models: [{{model: A, parameters: {{weight: {value}}}}}, {{model: B}}]\nmerge_method: linear\n"
            "parameters: {weight: 1}"
        )
        yield Config(f"linear, {name}", text)
    yield Config(
        "ties, falling through levels",
        "models:\n"
        "  - {model: A, parameters: {weight: [{filter: mlp, value: 0.9}], density: [1, 0.5]}}\n"
        "  - {model: B, parameters: {density: [{filter: q_proj, value: 0.2}, {value: 0.6}]}}\n"
        "merge_method: ties\nbase_model: BASE\nparameters: {weight: [0.4, 0.8], density: 0.7}",
    )
    yield Config(
        "task_arithmetic, lambda by filter and normalize by filter",
        f"{weighted(0.5, 0.9)}\nmerge_method: task_arithmetic\nbase_model: BASE\n"
        "parameters: {lambda: [{filter: mlp, value: 0.5}], normalize: [{filter: down, value: true}]}",
    )


def cut(model: str, start: int, end: int, parameters: str = "") -> str:
    own = f", parameters: {{{parameters}}}" if parameters else ""
    return f"{{model: {model}, layer_range: [{start}, {end}]{own}}}"


def stack(*slices: str) -> str:
    return "slices:\n" + "\n".join(f"  - sources: [{sources}]" for sources in slices)


def _slices() -> Iterator[Config]:
    plain = "merge_method: passthrough"
    yield Config(
        "slerp in slices",
        f"{stack(cut('BASE', 0, 4) + ', ' + cut('A', 0, 4))}\nmerge_method: slerp\nbase_model: BASE\n"
        "parameters: {t: [0, 1]}",
    )
    yield Config("stacked", f"{stack(cut('A', 0, 3), cut('B', 1, 4))}\n{plain}")
    silent = "scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]"
    yield Config(
        "stacked with itself, output projections at 0", f"{stack(cut('A', 0, 3), cut('A', 2, 4, silent))}\n{plain}"
    )
    yield Config(
        "stacked, filter on a layer's own number",
        f"{stack(cut('A', 0, 2), cut('B', 1, 4))}\n{plain}\n"
        "parameters: {scale: [{filter: layers.2.mlp, value: 0.5}, {value: 1.0}]}",
    )
    yield Config("one layer at a time", f"{stack(*(cut(m, i, i + 1) for i, m in enumerate('ABCA')))}\n{plain}")
    both = cut("A", 0, 2, "weight: [0, 1]") + ", " + cut("B", 1, 3, "weight: 1")
    yield Config(
        "linear of slices, unlike places",
        f"{stack(both, cut('C', 3, 4, 'weight: [0.2, 0.9]'))}\n    parameters: {{normalize: false}}\n"
        "merge_method: linear",
    )
    pairs = stack(cut("BASE", 0, 2) + ", " + cut("A", 0, 2), cut("BASE", 1, 4) + ", " + cut("B", 1, 4))
    yield Config(
        "slerp of slices, filter on the output's number",
        f"{pairs}\nmerge_method: slerp\nbase_model: BASE\n"
        "parameters: {t: [{filter: layers.3.mlp, value: 1}, {value: [0.2, 0.6]}]}",
    )
    low, high = (", ".join(cut(m, *range_) for m in ("BASE", "A", "B")) for range_ in ((0, 2), (2, 4)))
    yield Config(
        "ties of slices",
        f"{stack(low, high)}\n    parameters: {{density: 0.9}}\n"
        "merge_method: ties\nbase_model: BASE\nparameters: {weight: 0.5, density: 0.4}",
    )


def _dtypes() -> Iterator[Config]:
    sixteen = "models: [{model: A16, parameters: {weight: 0.5}}, {model: B16, parameters: {weight: 0.7}}]"
    for dtype in ("", "dtype: bfloat16", "dtype: float32", "dtype: float32\nout_dtype: bfloat16", "dtype: float16"):
        said = dtype.replace("\n", ", ") or "no dtype"
        yield Config(f"bfloat16 models, linear, {said}", f"{sixteen}\nmerge_method: linear\n{dtype}")
        yield Config(
            f"bfloat16 models, ties, {said}",
            f"{sixteen}\nmerge_method: ties\nbase_model: BASE16\nparameters: {{density: 0.5}}\n{dtype}",
            unlike=EQUALS,
        )
    yield Config(
        "float32 models, task_arithmetic, out_dtype: bfloat16",
        f"{weighted(0.5, 0.7)}\nmerge_method: task_arithmetic\nbase_model: BASE\nout_dtype: bfloat16",
    )
    yield Config(
        "float32 models, linear, dtype: bfloat16", f"{weighted(0.5, 0.7)}\nmerge_method: linear\ndtype: bfloat16"
    )
