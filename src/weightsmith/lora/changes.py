"""What a fine-tune has changed, and which of it an adapter can hold, in which form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from weightsmith.core.errors import PlanError, SourceError, some
from weightsmith.core.keys import Key, role_of
from weightsmith.core.lazy import torch
from weightsmith.engine.stream import each_tensor
from weightsmith.io.architectures import EMBEDDINGS, LOOKED_UP
from weightsmith.io.read.source import Source

__all__ = ["Changes", "find_changes", "holds_experts", "is_embedding"]

_FUSED = re.compile(r"\.experts\.(gate_up_proj|up_proj|down_proj)$")

_STEP = 1 << 22  # elements compared at once


@dataclass(frozen=True)
class Changes:
    """What becomes of each changed tensor.

    low     module -> its weight, for matrices that become factors; fused experts under the parameter's own name
    saved   module -> its weight and bias, kept in full (modules_to_save)
    biases  changed biases of modules in `low`
    lost    changed tensors that an adapter cannot hold -> why
    notes   what the user should know
    """

    low: Mapping[str, Key]
    saved: Mapping[str, Sequence[Key]]
    biases: Sequence[Key]
    lost: Mapping[str, str]
    notes: Sequence[str]

    def without_whole(self) -> Changes:
        """The factors alone; a note says what is left out."""
        names = [*self.lost, *(key.name for keys in self.saved.values() for key in keys)]
        names += [key.name for key in self.biases]
        notes = [f"left out although changed: {some(names)}"] if names else []
        return Changes(self.low, {}, (), {}, notes)

    def refuse_lost(self) -> None:
        """PlanError where something would be lost silently."""
        if self.lost:
            name, why = next(iter(self.lost.items()))
            more = f" (and {len(self.lost) - 1} more)" if len(self.lost) > 1 else ""
            raise PlanError([f"{name} changed, but an adapter cannot hold it: {why}{more}; --skip leaves it out"])


def find_changes(
    tuned: Source,
    origin: Source,
    include: Sequence[str],
    exclude: Sequence[str],
    whole_embeddings: bool,
    plain: Callable[[str], bool] = lambda name: False,
) -> Changes:
    """Compare two models, tensor by tensor.  `whole_embeddings`: those are kept in full, as they are if longer now.

    plain  whether the weight of an embedding of positions or types is known to be looked up as one of tokens is

    Raises SourceError where `origin` is not what `tuned` was made from.
    """
    fates = {
        key.name: _fate(key, tuned, origin, whole_embeddings, plain)
        for key in _changed(tuned, origin, include, exclude)
    }
    notes = [note for _, note in fates.values() if note]
    gone = [name for name in origin.keys if name not in tuned.keys and name not in tuned.aliases]
    if gone:
        several = f"{gone[0]} and {len(gone) - 1} more" if len(gone) > 1 else gone[0]
        notes.append(f"in {origin} alone, not in {tuned}: {several}")

    def having(fate: str) -> Iterator[tuple[str, Key]]:
        return ((_module(name), tuned.keys[name]) for name, (found, _) in fates.items() if found == fate)

    full = dict.fromkeys(module for module, _ in having("saved"))
    return Changes(
        low={module: key for module, key in having("low") if module not in full},
        saved={module: [tuned.keys[n] for n in _parts(module) if n in tuned.keys] for module in full},
        biases=[key for module, key in having("bias") if module not in full],
        lost={key.name: _unfit(key) for _, key in having("lost")},
        notes=notes,
    )


def is_embedding(key: Key) -> bool:
    """Whether a matrix is the weight of an embedding of tokens, which its module's own name tells."""
    return len(key.shape) == 2 and _own(key) in EMBEDDINGS


def _is_other_embedding(key: Key) -> bool:
    """Whether it is one of positions or types: models look such up in ways of their own, which factors would miss."""
    return role_of(_own(key)) == "embed" and _own(key) not in EMBEDDINGS


def _own(key: Key) -> str:
    """The last name of a tensor's module."""
    return key.name.removesuffix(".weight").rpartition(".")[2]


def holds_experts(key: Key) -> bool:
    """Whether a tensor holds all experts of a module."""
    return len(key.shape) == 3 and _FUSED.search(key.name) is not None


def _module(name: str) -> str:
    """The module that a tensor belongs to; fused experts are a module of their own."""
    return name if _FUSED.search(name) else name.rpartition(".")[0]


def _parts(module: str) -> tuple[str, str]:
    return f"{module}.weight", f"{module}.bias"


def _changed(tuned: Source, origin: Source, include: Sequence[str], exclude: Sequence[str]) -> Iterator[Key]:
    wanted = [
        key for key in tuned.keys.values()
        if (not include or _matches(key.name, include)) and not _matches(key.name, exclude)
    ]  # fmt: skip
    same = each_tensor(wanted, lambda key: _equal(tuned, origin, key))
    yield from (key for key in wanted if not same[key.name])


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _equal(tuned: Source, origin: Source, key: Key) -> bool:
    """Whether a tensor did not change; compared by rows, so that no two full copies are held."""
    name = origin.aliases.get(key.name, key.name)
    other = origin.keys.get(name)
    if other is None or other.shape != key.shape:
        return False
    stored = other.dtype == key.dtype and not tuned.computes(key.name) and not origin.computes(name)
    step = max(1, _STEP // max(key.row_numel, 1))
    for start in range(0, key.rows, step):
        if stored:
            same = np.array_equal(tuned.bits(key.name, start, start + step), origin.bits(name, start, start + step))
        else:
            one, two = (s.read(key.name, start, start + step) for s in (tuned, origin))
            same = torch.equal(one.double(), two.double())
        if not same:
            return False
    return True


def _unfit(key: Key) -> str:
    """Why no adapter can hold a tensor, or ''."""
    module, _, leaf = key.name.rpartition(".")
    if not key.floating:
        return f"its dtype is {key.dtype}"
    return (
        "" if holds_experts(key) or (module and leaf in ("weight", "bias")) else "it is no weight or bias of a module"
    )


def _fate(
    key: Key, tuned: Source, origin: Source, whole_embeddings: bool, plain: Callable[[str], bool]
) -> tuple[str, str]:
    """What becomes of a changed tensor (low, saved, bias, lost), and a note or ''."""
    known = origin.keys.get(origin.aliases.get(key.name, key.name))
    if _unfit(key):
        return "lost", ""
    if known is None:
        return "saved", f"{key.name} is not in {origin}: kept in full"
    if known.shape != key.shape:
        if key.role not in ("embed", "head") or known.shape[1:] != key.shape[1:]:
            raise SourceError(
                f"{key.name} is {list(key.shape)} in {tuned}, but {list(known.shape)} in {origin}; is this its base?"
            )
        return "saved", (
            f"{key.name} has {key.shape[0]} rows, the base {known.shape[0]}: kept in full; resize the base's "
            f"embeddings to {key.shape[0]} rows before you load the adapter"
        )
    if holds_experts(key):
        return "low", ""
    module, _, leaf = key.name.rpartition(".")
    weight = tuned.keys.get(f"{module}.weight")
    matrix = weight is not None and len(weight.shape) == 2
    if weight is not None and matrix and (_is_other_embedding(weight) or is_embedding(weight)):
        called = is_embedding(weight) or (_own(weight) in LOOKED_UP and plain(weight.name))
        matrix = called and not whole_embeddings
    if not matrix:
        return "saved", ""
    return ("low" if leaf == "weight" else "bias"), ""
