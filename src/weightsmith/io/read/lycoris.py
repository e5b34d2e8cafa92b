"""LoHa, LoKr and whole differences: LyCORIS' own names for their parts, which peft uses too.

Sources: LoHa, arXiv:2108.06098; LyCORIS, arXiv:2309.14859.
"""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.core.errors import SourceError
from weightsmith.io.read.source import Source
from weightsmith.io.read.updates import Full, Hadamard, Kronecker, Matrix, Update

__all__ = ["PARTS", "lycoris_update"]

PARTS = (
    *("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2"),
    *("lokr_w1_a", "lokr_w1_b", "lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "lokr_w2"),
)
"""What the parts of a module are called, longer names first."""


def lycoris_update(parts: Mapping[str, str], file: Source, label: str) -> tuple[Update, int, bool]:
    """What the parts of one module (name of the part -> stored name) add; its rank; whether it has none (all whole)."""
    update: Update
    if "diff" in parts:
        full = _whole(file, parts["diff"], label)
        return Full(full), full.rank, True
    kind = "hada" if any(part.startswith("hada_") for part in parts) else "lokr"
    one, two = (_matrix(parts, file, f"{kind}_w{i}", f"{kind}_t{i}", label) for i in "12")
    if kind == "hada":
        if one.shape != two.shape:
            raise SourceError(f"{label}: hada_w1 is {list(one.shape)}, hada_w2 is {list(two.shape)}")
        update = Hadamard(one, two)
    else:
        update = Kronecker(one, two)
    thin = [matrix.rank for matrix in (one, two) if not matrix.whole]
    return update, thin[-1] if thin else 1, not thin


def _matrix(parts: Mapping[str, str], file: Source, name: str, core: str, label: str) -> Matrix:
    """One of the two matrices: stored whole, as b a, or as b t a."""
    if name in parts:
        return _whole(file, parts[name], label)
    if not {f"{name}_a", f"{name}_b"} <= parts.keys():
        raise SourceError(f"{label}: has {', '.join(sorted(parts))}, which is no whole LoHa or LoKr")
    b, a = (file.key(parts[f"{name}_{side}"]) for side in "ab")
    good = len(b.shape) == len(a.shape) == 2 and a.floating and b.floating
    if core in parts:
        middle = file.key(parts[core]).shape
        if not good or middle[:2] != (b.shape[0], a.shape[0]):
            raise SourceError(f"{label}: {core} is {list(middle)} between {list(b.shape)} and {list(a.shape)}")
        return Matrix((b.shape[1], a.shape[1], *middle[2:]), a.shape[0], b=b.name, a=a.name, core=parts[core])
    if not good or b.shape[1] != a.shape[0]:
        raise SourceError(f"{label}: {name}_a is {list(b.shape)}, {name}_b is {list(a.shape)}")
    return Matrix((b.shape[0], a.shape[1]), a.shape[0], b=b.name, a=a.name)


def _whole(file: Source, stored: str, label: str) -> Matrix:
    key = file.key(stored)
    if len(key.shape) < 2 or not key.floating:
        raise SourceError(f"{label}: {stored!r} is {key.dtype} {list(key.shape)}, not a matrix")
    return Matrix(key.shape, min(key.shape[0], key.numel // key.shape[0] if key.shape[0] else 0), whole=stored)
