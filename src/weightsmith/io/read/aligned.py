"""A model with its units in the order of another's: a view of it and the index vectors that `align` has written.

A folder of `align` holds permutations.safetensors, one int32 vector for each group of units, and weightsmith.json,
which says what the groups are and for which models they were found.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import OutputError, SourceError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.symmetry import Axis, Orders, SymmetryGroup, identity, indices
from weightsmith.io.package.manifest import read_manifest
from weightsmith.io.read.experts import laid_out_like, packed_like_memory
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.source import Bits, Block, Source
from weightsmith.io.read.views import View
from weightsmith.io.read.widened import Halves, WidenedSource

__all__ = ["FITTED", "KIND", "ORDERS", "AlignedSource", "Alignment", "FittedSource", "ReorderedSource", "aligned",
           "group_json", "identified", "read_alignment"]  # fmt: skip

KIND = "alignment"
"""What weightsmith.json calls such a folder."""
ORDERS = "permutations"
"""The file of index vectors, without its ending."""

FITTED = "fitted/"
"""How the names of tensors begin there that least squares gave for a partial merge."""

_KEPT = 2  # tensors kept whole: a reader goes through one block by block, and its rows come from everywhere
_FAR = 1 << 20  # bytes of a row from which on rows are read one by one


class Alignment:
    """What a folder of `align` holds.

    groups     with an order each;  orders: of groups, see `core.symmetry.Orders`
    halves     of a partial merge, the groups that become wider; they have no order
    fitted     of one with least squares: tensor -> its name in `file`, which both models show in place of their own
    reference  and moving: what identifies the models that it was made for, see `identified`
    """

    def __init__(
        self,
        path: Path,
        groups: tuple[SymmetryGroup, ...],
        orders: Orders,
        notes: Mapping[str, Any],
        halves: tuple[Halves, ...] = (),
        fitted: Source | None = None,
    ) -> None:
        self.path, self.groups, self.orders, self.halves = path, groups, orders, halves
        self.reference, self.moving = notes.get("reference", {}), notes.get("moving", {})
        self.notes = notes
        self.fitted = {
            name.removeprefix(FITTED): name for name in (fitted.keys if fitted else ()) if name.startswith(FITTED)
        }
        self.file = fitted


def read_alignment(folder: Path) -> Alignment:
    """Read a folder that `align` has written; SourceError for one that is none, is damaged, or lies about itself."""
    try:
        manifest = read_manifest(folder)
    except OutputError as error:
        raise SourceError(f"{error}; an alignment is what weightsmith align writes") from None
    notes = manifest.get("alignment")
    if manifest.get("kind") != KIND or not isinstance(notes, dict):
        raise SourceError(f"{folder}: no alignment but a {manifest.get('kind')}; make one with: weightsmith align")
    file = SafetensorsSource(folder / f"{ORDERS}.safetensors")
    try:
        groups = tuple(_group(found) for found in notes["groups"])
        wider = tuple(_group(found) for found in notes.get("wider", ()))
    except (KeyError, TypeError, ValueError):
        raise SourceError(f"{folder}: the groups in weightsmith.json are not those of this version") from None
    orders: dict[str, np.ndarray] = {}
    for group in groups:
        for name, same in identity(group).items():
            key = file.key(name)
            if key.dtype != "int32" or key.shape != same.shape:
                raise SourceError(f"{folder}: the order of {name} is {key.dtype} {list(key.shape)}, not {same.shape}")
            orders[name] = _whole_order(folder, name, file, name)
    halves = []
    for group in wider:
        merged, separate = (f"{group.name}/{what}" for what in ("merged", "separate"))
        both = _whole_order(folder, group.name, file, merged, separate)
        if both.shape != (2, group.size):
            raise SourceError(f"{folder}: {group.name} has {group.size} units, but an order of {both.shape[-1]}")
        count = file.key(merged).shape[1]
        halves.append(Halves(group, both[:, :count], both[:, count:]))
    return Alignment(folder, groups, orders, notes, tuple(halves), file)


def _whole_order(folder: Path, name: str, file: SafetensorsSource, *tensors: str) -> np.ndarray:
    """Index vectors side by side, every unit once in each row."""
    order = np.concatenate([file.bits(tensor).view(np.int32) for tensor in tensors], axis=-1).astype(np.int64)
    if not (np.sort(order, axis=-1) == np.arange(order.shape[-1])).all():
        raise SourceError(f"{folder}: the order of {name} is no permutation: a unit is twice there or lacking")
    return order


def identified(source: Source) -> Any:
    """What is the same for every copy of a model's files, and for no other model; {} for one in memory."""
    return _timeless(source.fingerprint())


def _timeless(found: Any) -> Any:
    if isinstance(found, Mapping) and found.get("view") in ("PackedExperts", "UnpackedExperts"):
        return _timeless(found["source"])  # the same model, laid out in another way
    if isinstance(found, Mapping):
        return {k: _timeless(v) for k, v in found.items() if k not in ("mtime_ns", "contents")}
    return [_timeless(v) for v in found] if isinstance(found, list) else found


# --- groups as plain values ------------------------------------------------------------------------


def group_json(group: SymmetryGroup) -> dict[str, Any]:
    """A group as weightsmith.json holds it."""
    axes = [[a.name, a.axis, a.start, a.outer, a.inner] for a in group.axes]
    inside = [group_json(small) for small in group.inside]
    return {"name": group.name, "kind": group.kind, "size": group.size, "axes": axes, "inside": inside}


def _group(found: Mapping[str, Any]) -> SymmetryGroup:
    axes = tuple(Axis(str(name), *map(int, places)) for name, *places in found["axes"])
    inside = tuple(_group(small) for small in found["inside"])
    if min((n for a in axes for n in (a.axis, a.start)), default=0) < 0 or int(found["size"]) < 1:
        raise ValueError("a negative place")
    if any(not (a.outer > 0 < a.inner) for a in axes):
        raise ValueError("a width below one")
    return SymmetryGroup(str(found["name"]), str(found["kind"]), int(found["size"]), axes, inside)


# --- the view --------------------------------------------------------------------------------------


def aligned(source: Source, alignment: Alignment) -> Source:
    """A model as an alignment shows it, with experts laid out as they are.

    In a partial merge both models become wider, the reference too.  Raises SourceError for any other model.
    """
    if not alignment.halves:
        return laid_out_like(AlignedSource(source, alignment), source)
    mine = identified(source)
    if mine not in (alignment.reference, alignment.moving):
        raise SourceError(f"{alignment.path}: made for two other models than {source}; align this one anew")
    if mine == alignment.reference:
        wide = WidenedSource(source, alignment.halves, 0)
    else:
        wide = WidenedSource(laid_out_like(AlignedSource(source, alignment), source), alignment.halves, 1)
    for name, stored in alignment.fitted.items():
        assert alignment.file is not None
        if name not in wide.keys or wide.keys[name].shape != alignment.file.key(stored).shape:
            raise SourceError(f"{alignment.path}: {stored} does not fit {source}; align it anew")
    return FittedSource(wide, alignment) if alignment.fitted else wide


class FittedSource(View):
    """A model in the layout of a partial merge, with the layers that least squares gave in place of its own.

    Both models show the same ones, so the mean of both has them.
    """

    shows = "fitted"

    def __init__(self, source: Source, alignment: Alignment) -> None:
        super().__init__(source)
        assert alignment.file is not None
        self._fitted, self._file = alignment.fitted, alignment.file

    def computes(self, name: str) -> bool:
        return self.key(name).name in self._fitted or super().computes(name)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        if (stored := self._fitted.get(key.name)) is None:
            return super().block(name, low, high, into)
        return self._file.read(stored, low, high)

    def fingerprint(self) -> dict[str, Any]:
        return {"view": self.shows, "source": self.source.fingerprint(), "fitted": self._file.fingerprint()}


class ReorderedSource(View):
    """A source whose tensors have other entries at the places of some axes: see `core.symmetry.indices`.

    told  what tells this view from another of the same source
    """

    shows = "reordered"

    def __init__(
        self, source: Source, places: Mapping[str, Mapping[int, np.ndarray]], told: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(source)
        self._places, self._told = places, dict(told or {})
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._whole: OrderedDict[str, Block] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_whole")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        places = self._places.get(key.name)
        if places is None:
            return super().block(name, low, high, into)
        rows = np.arange(key.rows)[low:high]
        found = self._rows(key, places[0][low:high]) if 0 in places else self.source.block(key.name, low, high)
        others = [(axis, index if index.ndim == 1 else index[rows]) for axis, index in places.items() if axis > 0]
        if isinstance(found, Bits):
            array = found.array
            for axis, index in others:
                array = _taken(array, axis, index)
            return Bits(np.ascontiguousarray(array), found.dtype)
        for axis, index in others:
            found = _taken_tensor(found, axis, index)
        return found

    def read_cost(self, name: str) -> float:
        places = self._places.get(self.key(name).name, {})
        return super().read_cost(name) + (2.0 * _KEPT if 0 in places else 1.0 if places else 0.0)

    def fingerprint(self) -> dict[str, Any]:
        return {"view": self.shows, "source": self.source.fingerprint(), **self._told}

    def _rows(self, key: Key, wanted: np.ndarray) -> Block:
        """Rows of the source, in their order."""
        if len(wanted) and (np.diff(wanted) == 1).all():
            return self.source.block(key.name, int(wanted[0]), int(wanted[-1]) + 1)
        if key.nbytes // max(key.rows, 1) >= _FAR:
            rows = [self.source.block(key.name, int(row), int(row) + 1) for row in wanted]
            return _joined(rows, key)
        with self._lock:
            whole = self._whole.get(key.name)
            if whole is None:
                whole = self.source.block(key.name)
                self._whole[key.name] = whole
                while len(self._whole) > _KEPT:
                    self._whole.popitem(last=False)
        return Bits(whole.array[wanted], whole.dtype) if isinstance(whole, Bits) else whole[torch.from_numpy(wanted)]


class AlignedSource(ReorderedSource):
    """A source with its units in the order of an alignment; experts are shown packed.

    Raises SourceError where the alignment was made for another model.
    """

    shows = "aligned"

    def __init__(self, source: Source, alignment: Alignment) -> None:
        mine = identified(source)
        if alignment.moving and mine and mine != alignment.moving:
            raise SourceError(f"{alignment.path}: made for another model than {source}; align this one anew")
        packed = packed_like_memory(source)
        super().__init__(packed, indices(alignment.groups, alignment.orders, _shapes(packed, alignment)))
        self.alignment = alignment.path
        self.origin = source.origin.beside(locations=(*source.origin.locations, alignment.path))

    def fingerprint(self) -> dict[str, Any]:
        orders = SafetensorsSource(self.alignment / f"{ORDERS}.safetensors").fingerprint()
        return {"view": self.shows, "source": self.source.fingerprint(), "orders": orders}


def _joined(rows: Sequence[Block], key: Key) -> Block:
    bits = [row for row in rows if isinstance(row, Bits)]
    if len(bits) == len(rows) and rows:
        return Bits(np.concatenate([row.array for row in bits]), bits[0].dtype)
    tensors = [row.tensor() if isinstance(row, Bits) else row for row in rows]
    return torch.cat(tensors) if tensors else torch.empty((0, *key.shape[1:]))


def _taken(array: np.ndarray, axis: int, index: np.ndarray) -> np.ndarray:
    """Entries along an axis: index [length], or [rows, length] with one order for each row."""
    if index.ndim == 1:
        return np.take(array, index, axis=axis)
    shape = [len(index)] + [1] * (array.ndim - 1)
    shape[axis] = index.shape[1]
    return np.take_along_axis(array, index.reshape(shape), axis=axis)


def _taken_tensor(tensor: Any, axis: int, index: np.ndarray) -> Any:
    found = torch.from_numpy(index)
    if index.ndim == 1:
        return tensor.index_select(axis, found)
    shape = [len(index)] + [1] * (tensor.ndim - 1)
    shape[axis] = index.shape[1]
    return torch.take_along_dim(tensor, found.reshape(shape), axis)


def _shapes(source: Source, alignment: Alignment) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that move; SourceError where the source has none that fit."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group in alignment.groups:
        for axis in group.axes:
            if axis.name not in source.keys:
                raise SourceError(f"{alignment.path}: made for a model with the tensor {axis.name}; {source} has none")
            shape = shapes[axis.name] = source.keys[axis.name].shape
            length = shape[axis.axis] if axis.axis < len(shape) else -1
            if axis.start + axis.outer * group.size * axis.inner > length:
                raise SourceError(f"{alignment.path}: {axis.name} of {source} is {list(shape)}, which does not fit")
    return shapes
