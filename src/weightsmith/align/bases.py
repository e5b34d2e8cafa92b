"""Changes of basis inside layers that keep what a model computes, from the roles and shapes of its tensors.

Beside permutations (`align.layout`) a layer has continuous symmetries: values may be multiplied by any invertible
matrix that the output takes back, queries and keys by what commutes with their positions (`align.commute`), hidden
units of an MLP by numbers.  What is found here is a guess until `align.invariance` has tried it on a small model.
Derived from the algebra of attention (Model Unmerging, arXiv:2509.01548, has the idea; its code was not at hand).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from weightsmith.align.attention import Found, HeadAxes, found_in, placed, rotated
from weightsmith.align.layout import layout
from weightsmith.align.parts import Model, Tensor
from weightsmith.core.symmetry import Axis, SymmetryGroup
from weightsmith.core.turn import Turn
from weightsmith.io.architectures import GAIN_PLUS_ONE
from weightsmith.io.read.source import Source

__all__ = ["Attention", "Bases", "Branch", "Hidden", "Run", "bases"]


@dataclass(frozen=True)
class Run:
    """Heads on one axis of a tensor: blocks of `width` entries from `start` on, the next one `every` entries further.

    times  how many blocks, one behind the other, have the same matrix;  plus: see `core.turn.Turn`
    """

    name: str
    axis: int
    start: int
    every: int
    width: int
    times: int = 1
    plus: float = 0.0

    def turn(self, matrices: np.ndarray) -> Turn:
        """matrices: [heads, width, width], or [heads, width] for scales."""
        found = np.repeat(matrices, self.times, axis=0)
        if found.ndim == 3:
            return Turn(self.name, self.axis, self.start, found, self.every, self.plus)
        return Turn(self.name, self.axis, self.start, found.reshape(-1), 0, self.plus)


@dataclass(frozen=True)
class Branch:
    """Two sides that undo each other: what one is multiplied by A, the other is by A^-T.

    count   how many matrices of `width` entries there are: of key-value heads, or 1 that all share
    turned  entries that rotary position embeddings turn, as config.json says
    gains   of norms of the first side and of the second: runs of scales, shared by all heads or not
    normed  a norm stands behind the projections
    """

    count: int
    width: int
    first: tuple[Run, ...]
    second: tuple[Run, ...]
    turned: int = 0
    gains: tuple[tuple[Run, ...], tuple[Run, ...]] = ((), ())
    normed: bool = False

    @property
    def shared(self) -> bool:
        """Whether one set of gains is that of all heads."""
        return all(run.times == 0 for side in self.gains for run in side)


@dataclass(frozen=True)
class Attention:
    """One attention.

    group   its key-value heads with their query heads, which may be permuted
    qk      queries (first) and keys (second): usually one branch;  vo: values (first) and outputs (second)
    """

    module: str
    group: SymmetryGroup
    qk: tuple[Branch, ...]
    vo: Branch

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that belong to it."""
        runs = [r for b in (*self.qk, self.vo) for side in (b.first, b.second, *b.gains) for r in side]
        return tuple(dict.fromkeys((*self.group.names, *(run.name for run in runs))))


@dataclass(frozen=True)
class Hidden:
    """Hidden units of one MLP: its group of permutations, and where units may be scaled.

    gated   the up branch is multiplied by a gate's;  ups: runs of its rows, in the order in which they are tried
    """

    module: str
    group: SymmetryGroup
    gated: bool
    ups: tuple[tuple[Run, ...], ...]
    down: tuple[Run, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.group.names


@dataclass(frozen=True)
class Bases:
    """What was found, and by name of a module why nothing is known of it: of attentions, and of MLPs."""

    attentions: tuple[Attention, ...]
    hidden: tuple[Hidden, ...]
    unknown: Mapping[str, str]
    unknown_hidden: Mapping[str, str]

    @property
    def all(self) -> tuple[Attention | Hidden, ...]:
        return (*self.attentions, *self.hidden)


def bases(source: Source) -> Bases:
    """Find the changes of basis of a model; headers and config.json are read, nothing else."""
    model = Model(source)
    attentions: list[Attention] = []
    unknown: dict[str, str] = {}
    for module, tensors in model.by_module("q", "k", "v", "qkv", "o").items():
        found: Attention | str
        if _latent(model, module):
            found = _of_latents(model, module)
        else:
            parts = found_in(model, module, tensors, tables=True)
            found = parts if isinstance(parts, str) else _attention(model, module, parts)
        if isinstance(found, str):
            unknown[module] = found
        else:
            attentions.append(found)
    known = layout(source)
    by_name = {t.key.name: t for t in model.tensors}
    hidden = [_hidden(group, by_name) for group in known.groups if group.kind in ("mlp", "experts")]
    owners = {t.module for t in model.tensors if t.part in ("gate", "up", "gate_up", "down")}
    odd = {n.removesuffix(".hidden"): why for n, why in known.frozen.items() if n.removesuffix(".hidden") in owners}
    return Bases(tuple(attentions), tuple(hidden), unknown, odd)


# --- attention -------------------------------------------------------------------------------------


def _attention(model: Model, module: str, parts: Found) -> Attention | str:
    s = parts.shape
    axes = placed(module, s, parts.tensors)
    if isinstance(axes, str):
        return axes
    if s.query != s.key:
        return "queries are wider than keys"
    outputs = {t.key.name for t in parts.tensors if t.part == "o"}
    values = [_run(axes, a, s.value) for a in axes.values]
    vo = Branch(
        s.kv, s.value,
        tuple(run for run in values if run.name not in outputs), tuple(run for run in values if run.name in outputs),
    )  # fmt: skip
    turns = rotated(model, s.key)
    gains, normed = _gains(model, axes, parts), bool(parts.norms)
    asks = _joined([_run(axes, a, s.query) for a in axes.asks])
    keys = tuple(_run(axes, a, s.key) for a in axes.keys)
    qk = Branch(s.kv, s.key, asks, keys, turns, gains, normed)
    inside = (SymmetryGroup("queries", "queries", s.group, axes.queries),) if s.group > 1 else ()
    return Attention(module, SymmetryGroup(module, "kv", s.kv, axes.axes, inside), (qk,), vo)


def _run(axes: HeadAxes, place: Axis, width: int) -> Run:
    """The blocks of one axis inside key-value heads, over all of these."""
    outer = axes.axes[int(place.name)]
    every = width if place.outer > 1 else outer.inner  # those of one key-value head lie one behind the other
    return Run(outer.name, place.axis, outer.start + place.start, every, width, place.outer)


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Query heads of one tensor as one run, where they lie one behind the other."""
    found: dict[tuple[str, int, int], list[Run]] = {}
    for run in runs:
        found.setdefault((run.name, run.axis, run.every), []).append(run)
    out: list[Run] = []
    for (_, _, every), own in found.items():
        first, width = own[0], own[0].width
        if every == len(own) * width and [r.start for r in own] == [first.start + i * width for i in range(len(own))]:
            out.append(replace(first, every=width, times=len(own)))
        else:
            out += own
    return tuple(out)


def _gains(model: Model, axes: HeadAxes, parts: Found) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
    """Runs of norms' gains; `times` 0: one head's, shared by all."""
    plus = 1.0 if model.config.get("model_type") in GAIN_PLUS_ONE else 0.0
    sides: list[list[Run]] = [[], []]
    width = parts.shape.key
    for i, own in enumerate(axes.gains):
        sides[i] += [replace(run, plus=plus) for run in _joined([_run(axes, a, width) for a in own])]
    wide = {run.name for side in sides for run in side}
    for norm in parts.norms:
        if norm.key.name not in wide and len(norm.key.shape) == 1:
            last = norm.key.name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
            shift = 0.0 if norm.key.name.endswith("bias") else plus
            sides[last.startswith("k")].append(Run(norm.key.name, 0, 0, width, width, 0, shift))
    return tuple(sides[0]), tuple(sides[1])


_SIZES = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")


def _latent(model: Model, module: str) -> bool:
    """Whether keys and values come from one latent (multi-head latent attention)."""
    return f"{module}.kv_b_proj.weight" in model.source.keys


def _of_latents(model: Model, module: str) -> Attention | str:
    """Multi-head latent attention: only the part of heads without positions, and one rotated key for all heads."""
    config = model.modules.config
    said = [config.get(name) for name in _SIZES]
    if not all(isinstance(size, int) for size in said):
        return f"config.json does not say {' or '.join(n for n, v in zip(_SIZES, said, strict=True) if v is None)}"
    heads, nope, rope, value, latent = (int(size) for size in said if size is not None)
    keys = model.source.keys

    def there(*names: str) -> list[str]:
        return [f"{module}.{n}.{kind}" for n in names for kind in ("weight", "bias") if f"{module}.{n}.{kind}" in keys]

    asks, downs, ups = there("q_proj", "q_b_proj"), there("kv_a_proj_with_mqa"), there("kv_b_proj")
    output = f"{module}.o_proj.weight"
    shapes = {name: rows for names, rows in ((asks, heads * (nope + rope)), (downs, latent + rope),
                                             (ups, heads * (nope + value))) for name in names}  # fmt: skip
    if output not in keys or keys[output].shape[1] != heads * value or not (asks and downs):
        return f"its output does not read {heads} heads of {value} values"
    for name, rows in shapes.items():
        if keys[name].rows != rows:
            return f"{name} has {keys[name].rows} rows, where {rows} were expected"
    every = nope + rope
    free = Branch(
        heads, nope,
        tuple(Run(n, 0, 0, every, nope) for n in asks), tuple(Run(n, 0, 0, nope + value, nope) for n in ups),
    )  # fmt: skip
    shared = Branch(
        1, rope,
        tuple(Run(n, 0, nope, every, rope, heads) for n in asks), tuple(Run(n, 0, latent, rope, rope) for n in downs),
        rope,
    )  # fmt: skip
    vo = Branch(
        heads, value,
        tuple(Run(n, 0, nope, nope + value, value) for n in ups), (Run(output, 1, 0, value, value),),
    )  # fmt: skip
    axes = (
        *(Axis(n, 0, inner=every) for n in asks), *(Axis(n, 0, inner=nope + value) for n in ups),
        Axis(output, 1, inner=value),
    )  # fmt: skip
    return Attention(module, SymmetryGroup(module, "heads", heads, axes), (free, shared), vo)


# --- MLPs ------------------------------------------------------------------------------------------


def _hidden(group: SymmetryGroup, by_name: dict[str, Tensor]) -> Hidden:
    """Where the hidden units of one MLP may be scaled; nowhere in experts that are packed."""
    module = group.name.removesuffix(".hidden")
    if group.kind == "experts":
        return Hidden(module, group, False, (), ())
    down = tuple(Run(a.name, a.axis, a.start, 1, 1) for a in group.axes if by_name[a.name].part == "down")
    parts = {by_name[a.name].part for a in group.axes}
    if "gate_up" in parts:
        fused = [a for a in group.axes if by_name[a.name].part == "gate_up"]
        halves = [tuple(Run(a.name, a.axis, start, 1, 1) for a in fused) for start in (group.size, 0)]
        ups = tuple(halves) if all(a.outer == 2 for a in fused) else ()
        return Hidden(module, group, True, ups, down)
    up = tuple(Run(a.name, a.axis, a.start, 1, 1) for a in group.axes if by_name[a.name].part == "up")
    return Hidden(module, group, "gate" in parts, (up,), down)
