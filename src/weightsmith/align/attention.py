"""Attention heads that may be permuted: key-value heads, their query heads, entries of values and of keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightsmith.align.parts import Model, Tensor
from weightsmith.core.symmetry import Axis, SymmetryGroup

__all__ = ["Shape", "heads_of", "rotated", "shape_of"]


@dataclass(frozen=True)
class Shape:
    """Numbers and widths of heads: `query`, `value` and `key` are entries per head; `group` query heads per kv head."""

    kv: int
    group: int
    query: int
    key: int
    value: int


def heads_of(
    model: Model, module: str, tensors: Sequence[Tensor]
) -> tuple[list[SymmetryGroup], dict[str, str]]:  # fmt: skip
    """The groups of one attention, and by name what is frozen in it and why."""
    weights = {t.part: t for t in tensors if t.into is not None}
    output = weights.get("o")
    width = next((t.inputs for t in weights.values() if t.part != "o"), 0)
    count = model.heads(width)
    if output is None or not ({"qkv"} <= weights.keys() or {"q", "k", "v"} <= weights.keys()):
        return [], {module: "its matrices are not those of queries, keys, values and an output"}
    if len([t for t in tensors if t.into is not None]) != len(weights):
        return [], {module: "it has several matrices of one kind"}
    if not count:
        return [], {module: "config.json does not say how many heads it has"}
    shape = shape_of(weights, output.inputs, count)
    if shape is None:
        return [], {module: f"its shapes do not fit {count} heads"}
    known = {t.key.name for t in tensors}
    norms = [t for t in model.within(module) if t.part == "qk_norm"]
    others = [t for t in model.within(module) if t.key.name not in known and t.key.numel > 1]
    others = [t for t in others if t not in norms and t.part != "table"]
    others = [t for t in others if not (t.part == "norm" and t.key.shape == (width,))]
    sinks = [t for t in others if t.key.shape == (count,)]
    if strange := [t for t in others if t not in sinks]:
        return [], {module: f"{strange[0].key.name} {list(strange[0].key.shape)} may belong to its heads"}
    group = _group(model, module, shape, [*tensors, *norms, *sinks])
    if isinstance(group, str):
        return [], {module: group}
    return [group[0]], group[1]


def shape_of(weights: Mapping[str, Tensor], outputs: int, count: int) -> Shape | None:
    """The heads that fit all shapes; None where none do.  outputs: inputs of the output matrix."""
    if outputs % count:
        return None
    value = outputs // count
    if "qkv" in weights:
        rows = weights["qkv"].outputs
        kv, rest = divmod(rows // value - count, 2)
        return (
            Shape(kv, count // kv, value, value, value) if kv > 0 and not (rest or rows % value or count % kv) else None
        )
    q, k, v = (weights[part].outputs for part in ("q", "k", "v"))
    kv = v // value
    if kv < 1 or v % value or count % kv or q % count or k % kv:
        return None
    return Shape(kv, count // kv, q // count, k // kv, value)


def _group(
    model: Model, module: str, s: Shape, tensors: Sequence[Tensor]
) -> tuple[SymmetryGroup, dict[str, str]] | str:
    """The group of kv heads with those inside, and what is frozen; or why all of it is."""
    axes: list[Axis] = []
    queries: list[Axis] = []
    values: list[Axis] = []
    keys: list[Axis] = []

    def add(name: str, axis: int, inner: int, start: int = 0) -> str:
        axes.append(Axis(name, axis, start, 1, inner))
        return str(len(axes) - 1)

    free, why = _free_keys(model, s, tensors)
    for t in tensors:
        name = t.key.name
        if t.part == "q" or (t.part == "qk_norm" and t.key.numel == s.kv * s.group * s.query != s.kv * s.key):
            here = add(name, t.out, s.group * s.query)
            queries.append(Axis(here, t.out, inner=s.query))
            keys += [Axis(here, t.out, i * s.query + free) for i in range(s.group)]
        elif t.part == "k" or (t.part == "qk_norm" and t.key.numel == s.kv * s.key):
            here = add(name, t.out, s.key)
            keys.append(Axis(here, t.out, free))
        elif t.part == "v":
            values.append(Axis(add(name, t.out, s.value), t.out))
        elif t.part == "o" and t.into is not None:
            here = add(name, t.into, s.group * s.value)
            queries.append(Axis(here, t.into, inner=s.value))
            values.append(Axis(here, t.into, outer=s.group))
        elif t.part == "qkv" and "query_key_value" in name:  # [queries, key, value] of each kv head
            here = add(name, t.out, (s.group + 2) * s.value)
            queries.append(Axis(here, t.out, inner=s.value))
            keys += [Axis(here, t.out, i * s.value + free) for i in range(s.group + 1)]
            values.append(Axis(here, t.out, (s.group + 1) * s.value))
        elif t.part == "qkv":  # all queries, all keys, all values
            every = s.kv * s.group * s.query
            here = add(name, t.out, s.group * s.query)
            queries.append(Axis(here, t.out, inner=s.query))
            keys += [Axis(here, t.out, i * s.query + free) for i in range(s.group)]
            keys.append(Axis(add(name, t.out, s.key, every), t.out, free))
            values.append(Axis(add(name, t.out, s.value, every + s.kv * s.key), t.out))
        elif t.part == "other":  # sinks: a number for each query head
            queries.append(Axis(add(name, 0, s.group), 0))
        elif t.part == "qk_norm" and t.key.numel not in (s.query, s.key):
            return f"{name} {list(t.key.shape)} is neither as long as a head nor as all of them"
    inside = []
    if s.group > 1:
        inside.append(SymmetryGroup("queries", "queries", s.group, tuple(queries)))
    if s.value > 1:
        inside.append(SymmetryGroup("values", "values", s.value, tuple(values)))
    if not why and s.key - free > 1:
        inside.append(SymmetryGroup("keys", "keys", s.key - free, tuple(keys)))
    frozen = {f"{module}/keys": why} if why else {}
    return SymmetryGroup(module, "kv", s.kv, tuple(axes), tuple(inside)), frozen


def _free_keys(model: Model, s: Shape, tensors: Sequence[Tensor]) -> tuple[int, str]:
    """From which entry on those of keys and queries may be permuted, and why none may."""
    if any(t.part == "qk_norm" for t in tensors):
        return 0, "a norm of queries and keys tells their entries apart"
    if s.query != s.key:
        return 0, "queries are wider than keys"
    turned = rotated(model, s.key)
    if turned >= s.key:
        return 0, "rotary position embeddings turn pairs of them"
    return turned, ""


def rotated(model: Model, width: int) -> int:
    """How many entries of a head are turned by rotary position embeddings."""
    scopes = [model.config, *(v for v in model.config.values() if isinstance(v, dict))]
    words = [word for scope in scopes for word in scope]
    if not any("rope" in word or "rotary" in word for word in words):
        return 0
    for scope in scopes:
        if isinstance(dim := scope.get("rotary_dim"), int):
            return dim
        for word in ("partial_rotary_factor", "rotary_pct"):
            if isinstance(share := scope.get(word), (int, float)):
                return int(share * width)
    return width
