"""The symmetries of a whole transformer, from the roles and shapes of its tensors: no table of architectures.

    residual     the residual stream: columns of what reads it, rows of what writes it, norms and embeddings
    mlp          hidden units of an MLP
    kv           key-value heads with their query heads; inside each: query heads, entries of values, and entries of
                 keys where no rotation and no norm tells them apart
    experts      experts with their rows of the router; inside each: its hidden units

What is found here is a guess that `align.proof` tests before anything uses it; what is frozen has a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from weightsmith.align.attention import heads_of
from weightsmith.align.parts import READS, WRITES, Model, Tensor
from weightsmith.core.symmetry import Axis, SymmetryGroup
from weightsmith.io.architectures import INTERLEAVED_EXPERTS
from weightsmith.io.read.source import Source

__all__ = ["RESIDUAL", "Layout", "Unfit", "layout"]

RESIDUAL = "residual"


class Unfit(Exception):
    """Why a symmetry is not there: a sentence's end."""


@dataclass(frozen=True)
class Layout:
    """What may be permuted: groups, and by name what is frozen and why."""

    groups: tuple[SymmetryGroup, ...]
    frozen: Mapping[str, str] = field(default_factory=dict)

    def without(self, names: Iterable[str], why: str) -> Layout:
        """The same with some groups frozen, by their names or kinds."""
        chosen = set(names)
        gone = {g.name: why for g in self.groups if g.name in chosen or g.kind in chosen}
        return Layout(tuple(g for g in self.groups if g.name not in gone), {**self.frozen, **gone})


def layout(source: Source) -> Layout:
    """Find the groups of a model; headers and config.json are read, nothing else."""
    model = Model(source)
    groups: list[SymmetryGroup] = []
    frozen: dict[str, str] = {}
    finders: list[tuple[str, Callable[[], SymmetryGroup]]] = [(RESIDUAL, partial(_residual, model))]
    finders += [(f"{m}.hidden", partial(_mlp, model, m, ts)) for m, ts in _mlps(model)]
    finders += [(m, partial(_experts, model, m, ts)) for m, ts in _mlps(model, packed=True)]
    for name, find in finders:
        try:
            groups.append(find())
        except Unfit as reason:
            frozen[name] = str(reason)
    for module, tensors in model.by_module("q", "k", "v", "qkv", "o").items():
        found, reasons = heads_of(model, module, tensors)
        groups += found
        frozen |= reasons
    return Layout(tuple(groups), frozen)


def _mlps(model: Model, packed: bool = False) -> Iterator[tuple[str, list[Tensor]]]:
    yield from model.by_module("gate", "up", "gate_up", "down", packed=packed).items()


# --- the residual stream ---------------------------------------------------------------------------


def _residual(model: Model) -> SymmetryGroup:
    if len(model.widths) != 1:
        said = ", ".join(map(str, sorted(model.widths))) or "none that is known"
        raise Unfit(f"there is not one residual stream but several widths ({said})")
    (width,) = model.widths
    axes: list[Axis] = []
    for tensor in model.tensors:
        axis = _stream_axis(tensor, width)
        if axis is not None:
            axes.append(Axis(tensor.key.name, axis))
    return SymmetryGroup(RESIDUAL, "residual", width, tuple(axes))


def _stream_axis(tensor: Tensor, width: int) -> int | None:
    """The axis of the residual stream; None where a tensor has none."""
    shape, part = tensor.key.shape, tensor.part
    if part in ("qk_norm", "table") or width not in shape:
        return None
    if part == "embed":
        axis = 0 if len(shape) == 4 else len(shape) - 1
    elif part == "norm" and len(shape) == 1:
        axis = 0
    elif part in WRITES and (tensor.into is not None or len(shape) == 1 or tensor.packed):
        axis = tensor.out
    elif part in READS and tensor.into is not None:
        axis = tensor.into
    elif part in READS:
        return None  # a bias of what reads it
    else:
        raise Unfit(f"{tensor.key.name} {list(shape)} may belong to it, and its name does not say how")
    if shape[axis] != width:
        raise Unfit(f"{tensor.key.name} is {list(shape)} where {width} on axis {axis} was expected")
    return axis


# --- hidden units ----------------------------------------------------------------------------------


def _hidden(model: Model, module: str, tensors: Sequence[Tensor]) -> tuple[int, list[Axis]]:
    """Hidden units of an MLP or of every expert: how many, and their axes."""
    downs = [t for t in tensors if t.part == "down" and t.into is not None]
    ups = [t for t in tensors if t.part != "down"]
    if len(downs) != 1 or not any(t.into is not None for t in ups):
        raise Unfit("its matrices are not one that reads, or two, and one that writes")
    (down,) = downs
    assert down.into is not None
    axes = []
    interleaved = str(model.config.get("model_type")) in INTERLEAVED_EXPERTS
    for up in ups:
        times = 2 if up.part == "gate_up" else 1
        if up.outputs != times * down.inputs:
            raise Unfit(f"{up.key.name} has {up.outputs} outputs, {down.key.name} {down.inputs} inputs")
        axis = Axis(up.key.name, up.out, outer=times)
        axes.append(Axis(up.key.name, up.out, inner=times) if interleaved else axis)
    for other in model.within(module):
        if other.part == "norm" and other.key.shape == (down.inputs,):
            axes.append(Axis(other.key.name, 0))
        elif other.part == "other" and down.inputs in other.key.shape:
            raise Unfit(f"{other.key.name} {list(other.key.shape)} may belong to it, and its name does not say how")
    return down.inputs, [*axes, Axis(down.key.name, down.into)]


def _mlp(model: Model, module: str, tensors: Sequence[Tensor]) -> SymmetryGroup:
    size, axes = _hidden(model, module, tensors)
    return SymmetryGroup(f"{module}.hidden", "mlp", size, tuple(axes))


def _experts(model: Model, module: str, tensors: Sequence[Tensor]) -> SymmetryGroup:
    """Experts that are packed into one tensor, with their rows of the router."""
    size, axes = _hidden(model, module, tensors)
    count = tensors[0].key.shape[0]
    owner = module.rpartition(".")[0]
    routers = [
        t.key.name for t in model.within(owner) if t.part == "router" and t.key.shape and t.key.shape[0] == count
    ]
    if not routers:
        raise Unfit(f"no router with {count} rows is beside it")
    own = [t.key.name for t in tensors]
    inside = SymmetryGroup("hidden", "hidden", size, tuple(_inner(axis, own.index(axis.name)) for axis in axes))
    return SymmetryGroup(module, "experts", count, tuple(Axis(name, 0) for name in (*own, *routers)), (inside,))


def _inner(axis: Axis, number: int) -> Axis:
    return Axis(str(number), axis.axis, axis.start, axis.outer, axis.inner)
