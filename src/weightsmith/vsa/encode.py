"""JSON values as vectors of one length: MBAT with orthogonal matrices and soft numbers and strings.

    {key: value}   sum of M_key E(value), every child of length 1 before it is bound
    [a, b, c]      M_seq (E(a) + M_seq (E(b) + ...)), and a little of each unbound, so that shifted lists stay alike
    sets           of paths that are declared such: a plain sum
    words          atoms of lower-cased words and of groups of 3 characters
    numbers        atoms at knots of a signed logarithm, weighted by their nearness, so that near numbers are alike

Gallant (arXiv:2202.04771), MBAT: Gallant and Okaywe (2013).  Full text not at hand; what the paper leaves open is a
choice made here: gamma, the knots, the groups of characters, the default sets.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from weightsmith.core.errors import RecipeError
from weightsmith.ops.binders import Hadamard, generator, haar, hadamard

__all__ = ["DEEPEST", "MOST", "SETS", "Encoder", "Noise", "noise", "path_of"]

DEEPEST = 64
"""Levels of nesting that are encoded."""
MOST = 4096
"""Entries of an array that are encoded; of longer ones the first, with a warning."""
SETS = ("tags", "*.tags", "base_model", "exclude", "*.exclude", "license", "language", "datasets")
"""Paths of arrays whose order means nothing."""

_DENSE = 2048  # dimensions up to which keys have dense matrices
_MATRICES = 128  # kept: 4 MB each at 1024 dimensions
_VALUES = 16384  # bound values kept
_SMALL = 1e-8  # numbers below are alike
_KNOT, _REACH = 0.5, 2.0  # distance of knots on the logarithmic scale, and how far an atom reaches
_VERSION = 1


@dataclass(frozen=True, eq=False)
class Encoder:
    """How values become vectors; two of the same fields make the same vectors, in every process.

    dim      length of vectors;  seed: of all atoms and matrices
    binder   'dense' or 'hadamard' (a power of two); '': dense up to 2048
    weights  glob of a path -> weight of that field (default 1)
    sets     globs of paths of arrays whose order means nothing
    scales   glob of a path -> (low, high) of numbers that are not to be seen on a logarithmic scale
    gamma    how much of an array's entries does not depend on their place
    text     a function of a text to a vector of any one length, instead of words and characters
    """

    dim: int = 1024
    seed: int = 0
    binder: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    sets: Sequence[str] = SETS
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    gamma: float = 0.3
    text: Callable[[str], Any] | None = None
    warn: Callable[[str], object] | None = None
    _matrices: OrderedDict[str, Any] = field(default_factory=OrderedDict, repr=False)
    _bound: OrderedDict[tuple[str, ...], np.ndarray] = field(default_factory=OrderedDict, repr=False)
    _atoms: dict[tuple[str, str], np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for glob, weight in self.weights.items():
            if not math.isfinite(weight):
                raise RecipeError(f"weight of {glob} = {weight} is no finite number")
        if not 16 <= self.dim <= 65536:
            raise RecipeError(f"dim = {self.dim} is outside [16, 65536]")
        if self.binder not in ("", "dense", "hadamard"):
            raise RecipeError(f"binder = {self.binder!r}; known: dense, hadamard")
        if self.kind == "hadamard" and self.dim & (self.dim - 1):
            raise RecipeError(f"dim = {self.dim} is no power of two, which binder hadamard needs")
        if self.kind == "dense" and self.dim > 2 * _DENSE:
            raise RecipeError(f"dim = {self.dim} is too large for binder dense; take hadamard")

    @property
    def kind(self) -> str:
        """The binder that is used."""
        return self.binder or ("dense" if self.dim <= _DENSE else "hadamard")

    @property
    def schema(self) -> str:
        """What must be the same for vectors that are compared."""
        weights, scales = (sorted((k, v) for k, v in m.items()) for m in (self.weights, self.scales))
        text = "" if self.text is None else getattr(self.text, "__qualname__", repr(self.text))
        return json.dumps(
            [_VERSION, self.dim, self.seed, self.kind, weights, list(self.sets), scales, self.gamma, text]
        )

    def encode(self, value: Any, *, raw: bool = False) -> np.ndarray:
        """The vector of plain values: [dim] float32, of length 1; raw: the sum as it is, for exact unbinding.

        Raises RecipeError for values that JSON does not have, and for nesting above `DEEPEST` levels.
        """
        found = self._value(value, "", 0)
        return (found if raw else _unit(found)).astype(np.float32)

    def probe(self, vector: np.ndarray, path: str) -> np.ndarray:
        """What an encoded object holds at a path, with noise: M_b^T M_a^T v for 'a.b'."""
        found = np.asarray(vector, dtype=np.float64)
        for key in path_of(path):
            found = self._unbind(f"key {key}", found)
        return found

    def nearest(self, vector: np.ndarray, values: Sequence[Any], path: str = "") -> list[tuple[float, Any]]:
        """Values with their cosines to a (probed) vector, the nearest first; path: where they stand."""
        found = np.stack([_unit(self._value(value, path, 0)) for value in values])
        cosines = found @ _unit(np.asarray(vector, dtype=np.float64))
        return [(float(cosines[i]), values[i]) for i in np.argsort(-cosines, kind="stable")]

    # --- values

    def _value(self, value: Any, path: str, depth: int) -> np.ndarray:
        if depth > DEEPEST:
            raise RecipeError(f"{path[:80]}: nested deeper than {DEEPEST} levels")
        if isinstance(value, Mapping):
            return self._object(value, path, depth)
        if isinstance(value, (list, tuple)):
            return self._array(value, path, depth)
        if value is None or isinstance(value, bool):
            return self._atom("constant", str(value))
        if isinstance(value, (int, float, np.integer, np.floating)):
            return self._number(_float(value), path)
        if isinstance(value, str):
            return self._bind("text", self._string(value))
        raise RecipeError(f"{path or 'the value'}: {type(value).__name__} is no JSON value")

    def _object(self, value: Mapping[Any, Any], path: str, depth: int) -> np.ndarray:
        if not value:
            return self._atom("constant", "{}")
        total = np.zeros(self.dim)
        for key in sorted(value, key=str):
            here = f"{path}.{key}" if path else str(key)
            total += self._weight(here) * self._child(f"key {key}", value[key], here, depth)
        return total

    def _child(self, name: str, value: Any, path: str, depth: int) -> np.ndarray:
        """M_key E(value) of a value of length 1; those of the same key, place and value are kept."""
        place = (name, path, repr(value)) if isinstance(value, (str, int, float, bool, type(None))) else None
        if place is not None and place in self._bound:
            return self._bound[place]
        found = self._bind(name, _unit(self._value(value, path, depth + 1)))
        if place is not None:
            self._bound[place] = found
            while len(self._bound) > _VALUES:
                self._bound.popitem(last=False)
        return found

    def _array(self, value: Sequence[Any], path: str, depth: int) -> np.ndarray:
        if not value:
            return self._atom("constant", "[]")
        if len(value) > MOST:
            if self.warn is not None:
                self.warn(f"{path or 'an array'} has {len(value)} entries; the first {MOST} are encoded")
            value = value[:MOST]
        children = [_unit(self._value(one, f"{path}.*" if path else "*", depth + 1)) for one in value]
        if any(fnmatchcase(path, glob) for glob in self.sets):
            return np.asarray(sum(children))
        found = np.zeros(self.dim)
        for child in reversed(children):
            found = self._bind("sequence", child + found)
        return np.asarray(found + self.gamma * np.sum(children, axis=0))

    def _number(self, value: float, path: str) -> np.ndarray:
        if not math.isfinite(value):
            return self._atom("constant", repr(value))
        scale = next((found for glob, found in self.scales.items() if fnmatchcase(path, glob)), None)
        if scale is None:
            # apart from log(_SMALL), as the quotient of the largest numbers would be infinite
            place = math.copysign(math.log(abs(value) + _SMALL) - math.log(_SMALL), value) / _KNOT
        else:
            low, high = scale
            place = (value - low) / ((high - low) or 1.0) * 20
        found = 0.5 * self._atom("constant", "number")
        reach = _REACH / _KNOT
        for knot in range(math.ceil(place - reach), math.floor(place + reach) + 1):
            found = found + (1 - abs(place - knot) / reach) * self._atom("knot", str(knot))
        return found

    def _string(self, value: str) -> np.ndarray:
        if self.text is not None:
            return self._embedded(value)
        words = re.findall(r"[^\W_]+", value.lower())
        found = np.zeros(self.dim)
        for word in words:
            found += self._atom("word", word)
            padded = f" {word} "
            for i in range(len(padded) - 2):
                found += 0.5 * self._atom("letters", padded[i : i + 3])
        return found if words else self._atom("constant", repr(value.strip()))

    def _embedded(self, value: str) -> np.ndarray:
        """The user's vector, turned into this space by orthonormal columns."""
        assert self.text is not None
        vector = np.asarray(self.text(value), dtype=np.float64).reshape(-1)
        if vector.size > self.dim:
            raise RecipeError(f"text gives {vector.size} numbers, more than dim = {self.dim}")
        name = f"projection {vector.size}"
        if name not in self._matrices:
            draw = generator(self.seed, name)
            self._matrices[name] = np.linalg.qr(draw.standard_normal((self.dim, vector.size))).Q
        return np.asarray(self._matrices[name] @ vector)

    # --- atoms and matrices

    def _atom(self, kind: str, name: str) -> np.ndarray:
        found = self._atoms.get((kind, name))
        if found is None:
            if len(self._atoms) > _VALUES:
                self._atoms.clear()
            found = self._atoms[kind, name] = _unit(generator(self.seed, kind, name).standard_normal(self.dim))
        return found

    def _matrix(self, name: str) -> Any:
        found = self._matrices.get(name)
        if found is None:
            draw = generator(self.seed, "matrix", name)
            if self.kind == "dense":
                found = haar(draw, self.dim).astype(np.float32)
            else:
                found = hadamard(draw, self.dim)
            self._matrices[name] = found
            while len(self._matrices) > _MATRICES:
                self._matrices.popitem(last=False)
        else:
            self._matrices.move_to_end(name)
        return found

    def _bind(self, name: str, vector: np.ndarray) -> np.ndarray:
        matrix = self._matrix(name)
        return matrix.bind(vector) if isinstance(matrix, Hadamard) else matrix @ vector.astype(np.float32)

    def _unbind(self, name: str, vector: np.ndarray) -> np.ndarray:
        matrix = self._matrix(name)
        return matrix.unbind(vector) if isinstance(matrix, Hadamard) else matrix.T @ vector.astype(np.float32)

    def _weight(self, path: str) -> float:
        return next((float(w) for glob, w in self.weights.items() if fnmatchcase(path, glob)), 1.0)


def path_of(text: str) -> list[str]:
    """'a.b' as ['a', 'b']; a dot that belongs to a key is written '\\.'."""
    return [part.replace("\\.", ".") for part in re.split(r"(?<!\\)\.", text)]


def _float(value: Any) -> float:
    """A number, infinite where an integer is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _unit(vector: np.ndarray) -> np.ndarray:
    size = float(np.linalg.norm(vector))
    return vector / size if size else vector


@dataclass(frozen=True)
class Noise:
    """What probes and searches have to stand out from.

    signal      cosine of a probed field with what stands there: 1 / sqrt(fields)
    spread      standard deviation of the cosine with anything else: 1 / sqrt(dim)
    chance      the largest of that among so many candidates: sqrt(2 ln candidates / dim)
    """

    signal: float
    spread: float
    chance: float

    @property
    def reliable(self) -> bool:
        return self.signal > self.chance


def noise(fields: int, dim: int, candidates: int) -> Noise:
    """Predicted for objects of so many fields of equal weight."""
    return Noise(1 / math.sqrt(max(fields, 1)), 1 / math.sqrt(dim), math.sqrt(2 * math.log(max(candidates, 2)) / dim))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything that is no object or array."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        inner_values: Iterable[Any] = value
        for inner in inner_values:
            yield from leaves(inner, f"{path}.*" if path else "*")
    else:
        yield path, value
