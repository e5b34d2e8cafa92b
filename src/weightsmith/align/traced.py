"""Symmetries of any `nn.Module`: which axes of its parameters may be permuted together, from a trace of its operations.

torch.fx follows an example through the network.  Axes that an operation joins get one permutation (union-find): an
addition joins both sides, a layer joins its input with the second axis of its weight.  What an operation is not known
to leave alone is frozen and named.  As for transformers every group is then proved by running the network in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from weightsmith.align.layout import Layout
from weightsmith.align.proof import drawn, random_numbers, refuted
from weightsmith.core.errors import SourceError
from weightsmith.core.symmetry import Axis, SymmetryGroup, permute

__all__ = ["traced"]

Dims = tuple["_Dim", ...]

_SAME = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish,
    nn.Hardtanh, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Softmax, nn.LogSoftmax,
)  # fmt: skip
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SAME_CALLS = (
    "relu", "relu_", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "softplus", "hardswish", "dropout", "abs",
    "exp", "log", "sqrt", "neg", "square", "contiguous", "clone", "float", "double", "softmax", "log_softmax", "clamp",
)  # fmt: skip
_JOINING = ("add", "add_", "iadd", "sub", "mul", "imul", "mul_", "truediv", "div", "maximum", "minimum")
_POOL_CALLS = ("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")


_ENDS = ("it is part of the inputs", "it is part of the outputs", "it is no axis of units")


@dataclass(frozen=True)
class _Dim:
    """An axis of a value: units of a class of axes, each `inner` entries wide."""

    units: int
    inner: int = 1


@dataclass
class _Classes:
    """Classes of axes: union-find over numbers."""

    parent: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    frozen: dict[int, str] = field(default_factory=dict)
    entries: dict[tuple[str, int], _Dim] = field(default_factory=dict)

    def new(self, size: int, frozen: str = "") -> _Dim:
        self.parent.append(len(self.parent))
        self.size.append(size)
        if frozen:
            self.frozen[len(self.parent) - 1] = frozen
        return _Dim(len(self.parent) - 1)

    def find(self, units: int) -> int:
        while self.parent[units] != units:
            units = self.parent[units] = self.parent[self.parent[units]]
        return units

    def freeze(self, dims: Iterable[_Dim], why: str) -> None:
        for dim in dims:
            self.frozen.setdefault(self.find(dim.units), why)

    def join(self, a: _Dim, b: _Dim) -> None:
        """One permutation for both; where their units are not of one width neither has any."""
        left, right = self.find(a.units), self.find(b.units)
        if left == right and a.inner == b.inner:
            return
        if a.inner != b.inner or self.size[left] != self.size[right]:
            self.freeze((a, b), "axes of unlike layout meet")
            return
        self.parent[right] = left
        if right in self.frozen:
            self.frozen.setdefault(left, self.frozen[right])

    def holds(self, name: str, axis: int, dim: _Dim) -> None:
        """A parameter has these units on an axis; one that is used twice has them twice."""
        known = self.entries.setdefault((name, axis), dim)
        self.join(known, dim)


def traced(module: nn.Module, *inputs: Tensor) -> Layout:
    """The layout of a network, every group proved with random numbers for its parameters; it is not changed.

    inputs: one example, batch first.  Raises SourceError for what torch.fx cannot trace.
    """
    double = copy.deepcopy(module).double().eval()
    example = [x.double() if x.is_floating_point() else x for x in inputs]
    try:
        graph = fx.symbolic_trace(double)
        ShapeProp(graph).propagate(*example)
    except Exception as error:  # whatever the network's own code raises
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{type(module).__name__} cannot be traced by torch.fx: {said}") from error
    found = _layout(graph)
    _refill(double)
    return _proved(double, example, found)


# --- the trace -------------------------------------------------------------------------------------


def _layout(graph: fx.GraphModule) -> Layout:
    follow = _Follow(graph)
    for node in graph.graph.nodes:
        follow.step(node)
    classes = follow.classes
    members: dict[int, list[Axis]] = {}
    for (name, axis), dim in classes.entries.items():
        members.setdefault(classes.find(dim.units), []).append(Axis(name, axis, inner=dim.inner))
    groups: list[SymmetryGroup] = []
    frozen: dict[str, str] = {}
    for root, axes in members.items():
        name = axes[0].name.rpartition(".")[0] or axes[0].name
        why = classes.frozen.get(root, "")
        if why in _ENDS or classes.size[root] < 2:
            continue  # classes and features have their order; one unit has none
        if why:
            frozen.setdefault(name, why)
        elif len({a.name.rpartition(".")[0] for a in axes}) > 1:  # else nothing reads the units
            name = axes[0].name if any(g.name == name for g in groups) else name
            groups.append(SymmetryGroup(name, "traced", classes.size[root], tuple(axes)))
    return Layout(tuple(groups), frozen)


class _Follow:
    """Follows a graph node by node; values are tuples of axes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph, self.classes = graph, _Classes()
        self.values: dict[fx.Node, Dims] = {}

    def step(self, node: fx.Node) -> None:
        if node.op == "output":
            for value in self._args(node):
                self.classes.freeze(value, _ENDS[1])
            return
        shape = tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))
        found: Dims | None = None
        if node.op == "placeholder":
            found = tuple(self.classes.new(n, _ENDS[0]) for n in shape)
        elif node.op == "get_attr":
            found = tuple(self.classes.new(n) for n in shape)
            for axis, dim in enumerate(found):
                self.classes.holds(str(node.target), axis, dim)
        elif node.op == "call_module":
            found = self._module(str(node.target), self.graph.get_submodule(str(node.target)), self._args(node), shape)
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            found = self._call(name, node, self._args(node), shape)
        if found is None or len(found) != len(shape):
            why = f"nothing is known of {node.target if isinstance(node.target, str) else node.name}"
            for value in self._args(node):
                self.classes.freeze(value, why)
            if node.op == "call_module":
                self._freeze_parameters(str(node.target), why)
            found = tuple(self.classes.new(n, why) for n in shape)
        self.values[node] = found

    def _args(self, node: fx.Node) -> list[Dims]:
        return [self.values[n] for n in node.all_input_nodes if n in self.values]

    def _freeze_parameters(self, target: str, why: str) -> None:
        module = self.graph.get_submodule(target)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            for axis, size in enumerate(tensor.shape):
                self.classes.holds(f"{target}.{name}", axis, self.classes.new(size, why))

    def _new(self, shape: Sequence[int], kept: Dims, why: str = _ENDS[2]) -> Dims:
        """Axes of a value: those kept, then frozen ones."""
        return (*kept, *(self.classes.new(n, why) for n in shape[len(kept) :]))

    def _weights(self, target: str, module: nn.Module, names: Iterable[str], dim: _Dim) -> None:
        for name in names:
            if getattr(module, name, None) is not None:
                self.classes.holds(f"{target}.{name}", 0, dim)

    def _module(self, target: str, module: nn.Module, args: list[Dims], shape: Sequence[int]) -> Dims | None:
        if len(args) != 1:
            return None
        (x,) = args
        if isinstance(module, nn.Linear):
            out = self.classes.new(module.out_features)
            self.classes.holds(f"{target}.weight", 1, x[-1])
            self._weights(target, module, ("weight", "bias"), out)
            return (*x[:-1], out)
        if isinstance(module, _CONVS):
            return self._convolution(target, module, x, shape)
        if isinstance(module, _NORMS):
            self._weights(target, module, ("weight", "bias", "running_mean", "running_var"), x[1])
            return x
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
            self._weights(target, module, ("weight", "bias"), x[-1])
            return x
        if isinstance(module, nn.Embedding):
            out = self.classes.new(module.embedding_dim)
            self.classes.holds(f"{target}.weight", 1, out)
            return (*x, out)
        if isinstance(module, _SAME):
            return x
        if isinstance(module, _POOLS):
            return self._new(shape, x[:2])
        if isinstance(module, nn.Flatten):
            return self._flat(x, module.start_dim, module.end_dim)
        return None

    def _convolution(self, target: str, module: Any, x: Dims, shape: Sequence[int]) -> Dims | None:
        into, out = (0, 1) if module.transposed else (1, 0)
        if module.groups == 1:
            units = self.classes.new(module.out_channels)
            self.classes.holds(f"{target}.weight", into, x[1])
            self.classes.holds(f"{target}.weight", out, units)
        elif module.groups == module.in_channels == module.out_channels:  # depthwise: a channel keeps its place
            units = x[1]
            self.classes.holds(f"{target}.weight", 0, units)
        else:
            return None
        if module.bias is not None:
            self.classes.holds(f"{target}.bias", 0, units)
        return self._new(shape, (x[0], units))

    def _call(self, name: str, node: fx.Node, args: list[Dims], shape: Sequence[int]) -> Dims | None:
        if name in _JOINING and 1 <= len(args) <= 2:
            return args[0] if len(args) == 1 else self._joined(*args)
        if not args:
            return None
        x = args[0]
        if name in _SAME_CALLS and len(args) == 1:
            return x
        if name in _POOL_CALLS:
            return self._new(shape, x[:2])
        if name == "flatten":
            given = [*node.args[1:], *node.kwargs.values()]
            start, end = [*given, *[0, -1][len(given) :]][:2]
            return self._flat(x, start, end) if isinstance(start, int) and isinstance(end, int) else None
        if name in ("view", "reshape") and len(args) == 1 and len(shape) == 2 and len(x) > 2:
            return self._flat(x, 1, -1)
        if name == "mean" and len(args) == 1:
            return self._mean(node, x)
        return None

    def _joined(self, a: Dims, b: Dims) -> Dims:
        """Both sides of an addition, aligned at their last axes; an axis of one is repeated."""
        longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
        found = list(longer)
        for i, dim in enumerate(reversed(shorter), 1):
            other = found[-i]
            sizes = [self.classes.size[self.classes.find(d.units)] * d.inner for d in (other, dim)]
            if sizes[0] == sizes[1]:
                self.classes.join(other, dim)
            elif sizes[0] == 1:
                found[-i] = dim
        return tuple(found)

    def _flat(self, x: Dims, start: int, end: int) -> Dims | None:
        start, end = start % len(x), end % len(x)
        sizes = [self.classes.size[self.classes.find(d.units)] * d.inner for d in x]
        if not start:
            return None
        inner = x[start].inner * prod(sizes[start + 1 : end + 1])
        return (*x[:start], _Dim(x[start].units, inner), *x[end + 1 :])

    def _mean(self, node: fx.Node, x: Dims) -> Dims | None:
        given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        keep = bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
        if given is None:
            return None
        chosen = {d % len(x) for d in (given if isinstance(given, (list, tuple)) else (given,)) if isinstance(d, int)}
        one = [self.classes.new(1, _ENDS[2]) if i in chosen else d for i, d in enumerate(x)]
        return tuple(d for i, d in enumerate(one) if keep or i not in chosen)


# --- the proof -------------------------------------------------------------------------------------


def _refill(module: nn.Module) -> None:
    """Random numbers for all parameters and statistics, so that no axis is neutral."""
    with torch.no_grad():
        for i, (name, tensor) in enumerate((*module.named_parameters(), *module.named_buffers())):
            if tensor.is_floating_point():
                numbers = random_numbers(name, tuple(tensor.shape), i)
                tensor.copy_(numbers.abs() + 0.1 if name.endswith("running_var") else numbers)


def _proved(module: nn.Module, example: Sequence[Tensor], found: Layout) -> Layout:
    start = {name: t.clone() for name, t in module.state_dict().items()}

    def outputs(state: dict[str, Tensor]) -> list[Tensor]:
        module.load_state_dict(state)
        with torch.no_grad():
            out = module(*example)
        return [t for t in (out if isinstance(out, (list, tuple)) else (out,)) if isinstance(t, Tensor)]

    expected = outputs(start)

    def change(groups: Sequence[SymmetryGroup]) -> float:
        state, draw = dict(start), np.random.default_rng(len(groups))
        for group in groups:
            state |= permute(state, group, drawn(group, draw))
        pairs = zip(outputs(state), expected, strict=True)
        return max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs)

    broken = refuted(found.groups, change)
    return Layout(tuple(g for g in found.groups if g.name not in broken), {**found.frozen, **broken})
