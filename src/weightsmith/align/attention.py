"""Attention heads that may be permuted: key-value heads, their query heads, entries of values and of keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from weightsmith.align.parts import Model, Tensor
from weightsmith.core.symmetry import Axis, SymmetryGroup

__all__ = ["Found", "HeadAxes", "Shape", "found_in", "heads_of", "placed", "rotated", "shape_of"]


@dataclass(frozen=True)
class Shape:
    """Numbers and widths of heads: `query`, `value` and `key` are entries per head; `group` query heads per kv head."""

    kv: int
    group: int
    query: int
    key: int
    value: int


@dataclass(frozen=True)
class Found:
    """One attention: its heads, the tensors that are theirs (norms of queries and keys, sinks), its stream's width."""

    shape: Shape
    tensors: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    width: int


def heads_of(
    model: Model, module: str, tensors: Sequence[Tensor]
) -> tuple[list[SymmetryGroup], dict[str, str]]:  # fmt: skip
    """The groups of one attention, and by name what is frozen in it and why."""
    found = found_in(model, module, tensors)
    group = found if isinstance(found, str) else _group(model, module, found.shape, found.tensors)
    if isinstance(group, str):
        return [], {module: group}
    return [group[0]], group[1]


def found_in(model: Model, module: str, tensors: Sequence[Tensor], tables: bool = False) -> Found | str:
    """What one attention is made of, or why that is not known.

    tables  one with a table of biases by distance is known too, though its heads cannot be permuted
    """
    weights = {t.part: t for t in tensors if t.into is not None}
    output = weights.get("o")
    width = next((t.inputs for t in weights.values() if t.part != "o"), 0)
    count = model.heads(width)
    if output is None or not ({"qkv"} <= weights.keys() or {"q", "k", "v"} <= weights.keys()):
        return "its matrices are not those of queries, keys, values and an output"
    if len([t for t in tensors if t.into is not None]) != len(weights):
        return "it has several matrices of one kind"
    if not count:
        return "config.json does not say how many heads it has"
    shape = shape_of(weights, output.inputs, count)
    if shape is None:
        return f"its shapes do not fit {count} heads"
    known = {t.key.name for t in tensors}
    norms = [t for t in model.within(module) if t.part == "qk_norm"]
    others = [t for t in model.within(module) if t.key.name not in known and t.key.numel > 1]
    others = [t for t in others if t not in norms and t.part != "table"]
    others = [t for t in others if not (t.part == "norm" and t.key.shape == (width,))]
    others = [t for t in others if not (tables and "relative_attention_bias" in t.key.name)]
    sinks = [t for t in others if t.key.shape == (count,)]
    if strange := [t for t in others if t not in sinks]:
        return f"{strange[0].key.name} {list(strange[0].key.shape)} may belong to its heads"
    return Found(shape, (*tensors, *norms, *sinks), tuple(norms), width)


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


@dataclass(frozen=True)
class HeadAxes:
    """Where the key-value heads of one attention lie, and in each of them what belongs to its heads.

    axes     of the key-value heads;  those of all others are called '0', '1', ... for these, and lie in one of them
    queries  whole query heads;  values: entries of values, where they are written and where the output reads them
    asks     entries of queries, one axis for each query head;  keys: entries of keys
    gains    entries of a norm over all heads: of queries and of keys
    """

    axes: tuple[Axis, ...]
    queries: tuple[Axis, ...]
    values: tuple[Axis, ...]
    asks: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    gains: tuple[tuple[Axis, ...], tuple[Axis, ...]] = ((), ())


def placed(module: str, s: Shape, tensors: Sequence[Tensor]) -> HeadAxes | str:
    """Where the heads lie, or why that is not known.  tensors: of `module`, with its norms of queries and keys."""
    axes: list[Axis] = []
    queries: list[Axis] = []
    values: list[Axis] = []
    asks: list[Axis] = []
    keys: list[Axis] = []
    gains: tuple[list[Axis], list[Axis]] = ([], [])

    def add(name: str, axis: int, inner: int, start: int = 0) -> str:
        axes.append(Axis(name, axis, start, 1, inner))
        return str(len(axes) - 1)

    for t in tensors:
        name = t.key.name
        wide = t.part == "qk_norm" and t.key.numel in (s.kv * s.group * s.query, s.kv * s.key)
        of_keys = wide and t.key.numel == s.kv * s.key and (s.group > 1 or _of_keys(name))
        if wide and len(t.key.shape) == 2:  # [heads, entries]
            here = add(name, 0, 1 if of_keys else s.group)
            queries += [] if of_keys else [Axis(here, 0)]
        elif wide and not (s.group == s.kv == 1):
            here = add(name, t.out, s.key if of_keys else s.group * s.query)
            if of_keys:
                gains[1].append(Axis(here, t.out))
            else:
                queries.append(Axis(here, t.out, inner=s.query))
                gains[0].extend(Axis(here, t.out, i * s.query) for i in range(s.group))
        elif t.part == "q":
            here = add(name, t.out, s.group * s.query)
            queries.append(Axis(here, t.out, inner=s.query))
            asks += [Axis(here, t.out, i * s.query) for i in range(s.group)]
        elif t.part == "k":
            keys.append(Axis(add(name, t.out, s.key), t.out))
        elif t.part == "v":
            values.append(Axis(add(name, t.out, s.value), t.out))
        elif t.part == "o" and t.into is not None:
            here = add(name, t.into, s.group * s.value)
            queries.append(Axis(here, t.into, inner=s.value))
            values.append(Axis(here, t.into, outer=s.group))
        elif t.part == "qkv" and "query_key_value" in name:  # [queries, key, value] of each kv head
            here = add(name, t.out, (s.group + 2) * s.value)
            queries.append(Axis(here, t.out, inner=s.value))
            asks += [Axis(here, t.out, i * s.value) for i in range(s.group)]
            keys.append(Axis(here, t.out, s.group * s.value))
            values.append(Axis(here, t.out, (s.group + 1) * s.value))
        elif t.part == "qkv":  # all queries, all keys, all values
            every = s.kv * s.group * s.query
            here = add(name, t.out, s.group * s.query)
            queries.append(Axis(here, t.out, inner=s.query))
            asks += [Axis(here, t.out, i * s.query) for i in range(s.group)]
            keys.append(Axis(add(name, t.out, s.key, every), t.out))
            values.append(Axis(add(name, t.out, s.value, every + s.kv * s.key), t.out))
        elif t.part == "other":  # sinks: a number for each query head
            queries.append(Axis(add(name, 0, s.group), 0))
        elif t.part == "qk_norm" and t.key.numel not in (s.query, s.key):
            return f"{name} {list(t.key.shape)} is neither as long as a head nor as all of them"
    both = (tuple(gains[0]), tuple(gains[1]))
    return HeadAxes(tuple(axes), tuple(queries), tuple(values), tuple(asks), tuple(keys), both)


def _of_keys(name: str) -> bool:
    """Whether a norm is that of keys, by its module's name: k_norm, key_layernorm."""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2].startswith("k")


def _group(
    model: Model, module: str, s: Shape, tensors: Sequence[Tensor]
) -> tuple[SymmetryGroup, dict[str, str]] | str:
    """The group of kv heads with those inside, and what is frozen; or why all of it is."""
    found = placed(module, s, tensors)
    if isinstance(found, str):
        return found
    free, why = _free_keys(model, s, tensors)
    inside = []
    if s.group > 1:
        inside.append(SymmetryGroup("queries", "queries", s.group, found.queries))
    if s.value > 1:
        inside.append(SymmetryGroup("values", "values", s.value, found.values))
    if not why and s.key - free > 1:
        keys = tuple(replace(axis, start=axis.start + free) for axis in (*found.asks, *found.keys))
        inside.append(SymmetryGroup("keys", "keys", s.key - free, keys))
    frozen = {f"{module}/keys": why} if why else {}
    return SymmetryGroup(module, "kv", s.kv, found.axes, tuple(inside)), frozen


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
