"""The experts of a mixture as checkpoints hold them: where each one's matrices are, and which axis counts hidden units.

    one by one   X.experts.E.{gate_proj, up_proj, down_proj | w1, w3, w2}.{weight, bias}
    fused        X.experts.{gate_up_proj, down_proj}, and {...}_bias, [experts, ...]: [out, in] or [in, out], the
                 outputs of gate and up one behind the other or in turns

Beside them the router: X.{gate, router}.*, X.e_score_correction_bias, rows in the order of the experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.core.keys import Key, layer_of
from weightsmith.core.lazy import torch
from weightsmith.core.problem import Code, Problem
from weightsmith.io.architectures import EXPERT_COUNTS, INTERLEAVED_EXPERTS
from weightsmith.io.read.layers import counted_blocks
from weightsmith.io.read.source import Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Part", "Stack", "expert_scope", "stacks_of"]

_INSIDE = re.compile(r"(?P<module>(?:.*\.)?experts)\.(?P<rest>.+)")
_ONE = re.compile(r"(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<kind>weight|bias)")
_ALL = re.compile(r"(?P<part>gate_up_proj|down_proj)(?P<kind>|_bias)")
_ROUTER = re.compile(r"(?:(?:gate|router)\.[\w.]+|e_score_correction_bias|expert_bias)")
_ODD = re.compile(r"^\.(?:gate|router)\.|\.(?:e_score_correction_bias|expert_bias)$")  # ERNIE's has [1, experts]
_DOWN = ("down_proj", "w2")


@dataclass(frozen=True)
class Part:
    """One of an expert's tensors, without the axis that counts experts.

    axis   the axis of its hidden units; None of what has none (biases of the output)
    folds  how often they lie there: 1; 2 for gate and up in one tensor
    turns  whether those two take turns, unit by unit
    out    the axis of a matrix's outputs: 0, or 1 where it is stored [in, out]
    """

    axis: int | None
    folds: int = 1
    turns: bool = False
    out: int = 0

    def ordered(self, tensor: Tensor, order: Tensor) -> Tensor:
        """The tensor with its hidden units in another order: position i gets unit order[i]."""
        if self.axis is None:
            return tensor
        count = len(order)
        index = order
        if self.folds == 2:
            index = (
                torch.stack((2 * order, 2 * order + 1), 1).flatten()
                if self.turns
                else torch.cat((order, order + count))
            )
        return tensor.index_select(self.axis, index)

    def units(self, tensor: Tensor) -> Tensor | None:
        """A row for each hidden unit: [units, numbers]; None where there are none."""
        if self.axis is None:
            return None
        rows = tensor.movedim(self.axis, 0)
        count = len(rows) // self.folds
        if self.folds == 2:
            rows = rows.reshape(count, 2, -1) if self.turns else rows.reshape(2, count, -1).transpose(0, 1)
        return rows.reshape(count, -1)

    def matrices(self, tensor: Tensor) -> list[Tensor]:
        """The matrices in it, each [out, in]: gate and up apart."""
        turned = tensor.T if self.out else tensor
        if self.folds == 1:
            return [turned]
        return [turned[0::2], turned[1::2]] if self.turns else list(turned.chunk(2))

    def joined(self, matrices: Sequence[Tensor]) -> Tensor:
        """The other way round."""
        if self.folds == 1:
            whole = matrices[0]
        else:
            whole = torch.stack(tuple(matrices), 1).flatten(0, 1) if self.turns else torch.cat(tuple(matrices))
        return whole.T if self.out else whole


@dataclass(frozen=True)
class Stack:
    """The experts of one layer.

    name     their module
    count    how many there are
    parts    word ('w1.weight', 'gate_up_proj_bias') -> Part
    fused    whether a word's tensors are one, NAME.WORD, with experts on its first axis; else NAME.EXPERT.WORD
    router   names of the tensors with a row for each expert
    hidden   hidden units of an expert
    """

    name: str
    count: int
    parts: Mapping[str, Part]
    fused: bool
    router: tuple[str, ...]
    hidden: int

    def tensors(self) -> Iterator[str]:
        """Names of all tensors of experts."""
        for word in self.parts:
            yield from ([f"{self.name}.{word}"] if self.fused else [self.of(e, word) for e in range(self.count)])

    def of(self, expert: int, word: str) -> str:
        """The name of the tensor that holds a word of an expert's."""
        return f"{self.name}.{word}" if self.fused else f"{self.name}.{expert}.{word}"

    def key(self, source: Source, word: str) -> Key:
        """An expert's own tensor of that word."""
        key = source.key(self.of(0, word))
        return Key(key.name, key.shape[1:], key.dtype) if self.fused else key

    def read(self, source: Source, expert: int, word: str) -> Tensor:
        """It, as it is stored."""
        name = self.of(expert, word)
        return source.read(name, expert, expert + 1)[0] if self.fused else source.read(name)


def stacks_of(source: Source, config: Mapping[str, Any]) -> tuple[list[Stack], list[str], list[Problem]]:
    """The experts of every layer that config.json counts; tensors of the blocks that it does not count; problems."""
    said = counted_blocks(config)
    counted = min(said[1]) if said is not None else None
    found: dict[str, dict[str, Key]] = {}
    beyond, problems = [], list[Problem]()
    for name, key in source.keys.items():
        place = layer_of(name)
        if name.startswith(("mtp.", "model.mtp.")) or (
            counted is not None and place is not None and place[1] >= counted
        ):
            beyond.append(name)
        elif inside := _INSIDE.fullmatch(name):
            found.setdefault(inside["module"], {})[inside["rest"]] = key
    made = []
    for module, tensors in found.items():
        stack = _stack(source, config, module, tensors)
        if isinstance(stack, str):
            problems.append(Problem(Code.FIT, module, stack))
        else:
            made.append(stack)
    if not found:
        problems.append(Problem(Code.FIT, str(source), f"{source}: no tensors of experts are in it"))
    return made, beyond if any(_INSIDE.fullmatch(n) for n in beyond) else [], problems


def _stack(source: Source, config: Mapping[str, Any], module: str, tensors: Mapping[str, Key]) -> Stack | str:
    """The experts of a module, or why they cannot be handled."""
    if strange := next((r for r in tensors if not _ONE.fullmatch(r) and not _ALL.fullmatch(r)), None):
        return f"{module}.{strange} is no part of an expert known here (quantised? decode the model first)"
    fused = any(_ALL.fullmatch(rest) for rest in tensors)
    if fused and not all(_ALL.fullmatch(rest) for rest in tensors):
        return f"{module} holds experts both fused and one by one"
    made = _fused(config, module, tensors) if fused else _single(module, tensors)
    if isinstance(made, str):
        return made
    count, hidden, parts = made
    parent = module.removesuffix("experts")
    beside = {n: k for n, k in source.keys.items() if n.startswith(parent) and not n.startswith(f"{module}.")}
    router = tuple(
        n for n, k in beside.items() if _ROUTER.fullmatch(n.removeprefix(parent)) and k.shape[:1] == (count,)
    )
    if not any(len(source.key(name).shape) == 2 for name in router):
        return f"{module}: no router of {count} rows beside it ({parent}gate.weight or {parent}router.weight)"
    odd = [n for n, k in beside.items() if count in k.shape and n not in router and _ODD.search(n[len(parent) - 1 :])]
    if odd:
        return f"{odd[0]} has {list(source.key(odd[0]).shape)} for {count} experts, which cannot be reduced here"
    return Stack(module, count, parts, fused, router, hidden)


def _single(module: str, tensors: Mapping[str, Key]) -> tuple[int, int, dict[str, Part]] | str:
    words: dict[str, dict[int, Key]] = {}
    for rest, key in tensors.items():
        number, _, word = rest.partition(".")
        words.setdefault(word, {})[int(number)] = key
    count = len(next(iter(words.values())))
    for word, keys in words.items():
        if sorted(keys) != list(range(count)):
            return f"{module}: {word} of experts {sorted(keys)[:3]}..., not of 0 to {count - 1}"
        if len({key.shape for key in keys.values()}) > 1:
            return f"{module}: {word} has unlike shapes among its experts"
    parts = {}
    for word in words:
        down, bias = word.startswith(_DOWN), word.endswith("bias")
        parts[word] = Part((None if bias else 1) if down else 0)
    down_word = next((w for w in words if w.startswith(_DOWN) and w.endswith("weight")), None)
    if down_word is None or len(words[down_word][0].shape) != 2:
        return f"{module}: no down projections, which experts are known by"
    return count, words[down_word][0].shape[1], parts


def _fused(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, Key]
) -> tuple[int, int, dict[str, Part]] | str:
    up, down = tensors.get("gate_up_proj"), tensors.get("down_proj")
    if up is None or down is None or len(up.shape) != 3 or len(down.shape) != 3 or up.rows != down.rows:
        return f"{module}: fused experts need gate_up_proj and down_proj of three axes, with one number of experts"
    count = down.rows
    plain = up.shape[1:] == (2 * down.shape[2], down.shape[1])
    flipped = up.shape[1:] == (down.shape[2], 2 * down.shape[1])
    if plain == flipped:
        return f"{module}: gate_up_proj {list(up.shape)} and down_proj {list(down.shape)} do not belong together"
    hidden = down.shape[2] if plain else down.shape[1]
    turns = bool(_types(config) & INTERLEAVED_EXPERTS)
    parts = {
        "gate_up_proj": Part(0 if plain else 1, 2, turns, 0 if plain else 1),
        "gate_up_proj_bias": Part(0, 2, turns),
        "down_proj": Part(1 if plain else 0, out=0 if plain else 1),
        "down_proj_bias": Part(None),
    }
    shapes = {
        "gate_up_proj_bias": (count, 2 * hidden),
        "down_proj_bias": (count, down.shape[1] if plain else down.shape[2]),
    }
    if wrong := next(
        (word for word, shape in shapes.items() if word in tensors and tensors[word].shape != shape), None
    ):
        return f"{module}.{wrong} is {list(tensors[wrong].shape)}; expected {list(shapes[wrong])}"
    return count, hidden, {word: part for word, part in parts.items() if word in tensors}


def _types(config: Mapping[str, Any]) -> set[str]:
    return {str(scope.get("model_type")) for scope in (config, *_inner(config))}


def _inner(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [value for value in config.values() if isinstance(value, dict)]


def expert_scope(config: Mapping[str, Any], count: int) -> tuple[Mapping[str, Any], tuple[str, ...]] | None:
    """The part of config.json that says how many experts there are, and the fields that do; None where none does."""
    for scope in (config, *_inner(config)):
        if names := tuple(name for name in EXPERT_COUNTS if scope.get(name) == count):
            return scope, names
    return None
