"""A model as a key locks it, and a locked model as it was: views that are calculated as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import xxhash

from weightsmith.align.bases import Attention, Bases, Branch, Hidden
from weightsmith.align.invariance import Known, Scheme, attention_turns, hidden_turns
from weightsmith.core.errors import PlanError, SourceError, some
from weightsmith.core.symmetry import Orders, SymmetryGroup, identity, indices
from weightsmith.core.turn import Turn, inverse
from weightsmith.engine.numeric import encode
from weightsmith.io.read.aligned import ReorderedSource
from weightsmith.io.read.experts import laid_out_like, packed_like_memory
from weightsmith.io.read.source import Source
from weightsmith.io.read.turned import TurnedSource
from weightsmith.protect.key import Key

__all__ = ["Change", "change_of", "changed", "equal_gains", "places_of", "refuse", "sample", "shapes_of"]

_FLOATS = ("float64", "float32", "bfloat16", "float16")
_SAMPLED = 16  # tensors of a digest
_ROWS = 4  # of each


@dataclass(frozen=True)
class Change:
    """What a lock does, or what takes it back: a permutation of heads and hidden units, and changes of basis after it.

    verb  'lock' or 'unlock'
    """

    verb: str
    groups: tuple[SymmetryGroup, ...]
    orders: Orders
    turns: tuple[Turn, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that are changed."""
        moved = [name for group in self.groups for name in group.names]
        return tuple(dict.fromkeys((*moved, *(turn.name for turn in self.turns))))


def _chosen(key: Key, found: Bases) -> Iterator[Attention | Hidden]:
    """The modules that are locked."""
    for one in found.all:
        wanted = {"qk", "vo", "heads"} if isinstance(one, Attention) else {"mlp"}
        if wanted & set(key.parts) and _named(one.module, key.modules):
            yield one


def _named(module: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(module, glob) for glob in globs)


def refuse(source: Source, found: Bases, known: Known, parts: Iterable[str], modules: Iterable[str]) -> None:
    """Raise PlanError with every module that is asked for and whose layout is not known."""
    wanted, globs = set(parts), tuple(modules)
    odd: dict[str, str] = {}
    if wanted & {"qk", "vo", "heads"}:
        odd |= {**found.unknown, **{o.module: w for o in found.attentions if (w := known.refusal(o))}}
    if "mlp" in wanted:
        odd |= {**found.unknown_hidden, **{o.module: w for o in found.hidden if (w := known.refusal(o))}}
    texts = [f"{name}: {why}" for name, why in odd.items() if _named(name, globs)]
    if texts:
        how = "choose --parts or --modules without it"
        raise PlanError([f"{source} cannot be locked: the layout of {text}; {how}" for text in texts])
    names = [one.module for one in found.all]
    if not names:
        raise SourceError(f"{source}: no attention and no MLP whose layout is known, so there is nothing to lock")
    if not any(_named(name, globs) for name in names):
        raise SourceError(f"{source}: no attention and no MLP is called {' or '.join(globs)}; it has {some(names)}")


def change_of(key: Key, found: Bases, verb: str = "lock") -> Change:
    """What a key does to a model with these places, or how that is taken back."""
    groups: list[SymmetryGroup] = []
    orders: dict[str, np.ndarray] = {}
    turns: list[Turn] = []
    for one in _chosen(key, found):
        kind = key.known.kind(one)
        moves = "heads" in key.parts or isinstance(one, Hidden)
        order = None
        if moves and kind not in key.known.still:
            groups.append(one.group)
            own = {n: key.draw(n, "order").permuted(same, axis=-1) for n, same in identity(one.group).items()}
            orders |= own
            # the permutation comes first both ways: taken back, it leaves matrices at the heads they were drawn for
            order = own[one.group.name] if verb == "lock" else None
        if isinstance(one, Attention):
            schemes = key.known.schemes[kind]
            turns += attention_turns(
                one, schemes, key.draw, key.condition, qk="qk" in key.parts, vo="vo" in key.parts, order=order,
                equal=_masks(key.equal.get(one.module, ())),
            )  # fmt: skip
        else:
            turns += hidden_turns(one, key.known.scaled[kind], key.draw, key.condition, order)
    if verb == "lock":
        return Change(verb, tuple(groups), orders, tuple(turns))
    return Change(verb, tuple(groups), _inverted(groups, orders), tuple(map(inverse, turns)))


def _masks(texts: Iterable[str]) -> list[np.ndarray | None]:
    return [np.array([c == "1" for c in text]) if text else None for text in texts]


def equal_gains(source: Source, found: Bases, known: Known) -> dict[str, tuple[str, ...]]:
    """Attention -> for each branch with a norm for all heads, which pairs of entries have equal gains in both norms."""
    packed = packed_like_memory(source)
    out: dict[str, tuple[str, ...]] = {}
    for one in found.attentions:
        masks = []
        for branch, scheme in zip(one.qk, known.schemes.get(known.kind(one), ()), strict=False):
            if branch.normed and branch.shared and scheme is not None and scheme.norm == "signs":
                masks.append(_equal(packed, branch, scheme))
            else:
                masks.append("")
        if any(masks):
            out[one.module] = tuple(masks)
    return out


def _equal(source: Source, branch: Branch, scheme: Scheme) -> str:
    gains = [source.read(run.name).double() for side in branch.gains for run in side]
    pairs = scheme.commutant(branch).pairs
    return "".join("1" if gains and all(bool(g[a] == g[b]) for g in gains) else "0" for a, b in pairs)


# --- views -----------------------------------------------------------------------------------------


def changed(source: Source, key: Key, change: Change) -> Source:
    """The model as the key locks it, or a locked one as it was.  Raises SourceError where tensors cannot be changed."""
    packed = packed_like_memory(source)
    _refuse_tensors(packed, change)
    moved = ReorderedSource(packed, places_of(packed, change))
    return laid_out_like(TurnedSource(moved, change.turns, {change.verb: key.hash}), source)


def places_of(source: Source, change: Change) -> Mapping[str, dict[int, np.ndarray]]:
    """Which entries stand where, by tensor and axis."""
    shapes = {name: source.key(name).shape for group in change.groups for name in group.names}
    return indices(change.groups, change.orders, shapes)


def _inverted(groups: Iterable[SymmetryGroup], orders: Orders) -> dict[str, np.ndarray]:
    """Orders that take others back."""
    out: dict[str, np.ndarray] = {}
    for group in groups:
        out[group.name] = back = np.argsort(orders[group.name])
        for small in group.inside:
            name = group.inner(small)
            out[name] = np.argsort(orders[name][back], axis=-1)
    return out


def _refuse_tensors(source: Source, change: Change) -> None:
    tied = {held: name for name, held in source.aliases.items()}
    for name in change.names:
        key = source.keys.get(name)
        if key is None:
            raise SourceError(f"{source}: no tensor {name}, which the layout of its heads names")
        if key.dtype not in _FLOATS:
            raise SourceError(f"{source}: {name} is stored as {key.dtype}; lock the model before it is quantised")
        if name in tied:
            raise SourceError(f"{source}: {name} is tied to {tied[name]}, which would change with it; untie them first")


# --- which model -----------------------------------------------------------------------------------


def shapes_of(source: Source) -> str:
    """A digest of names, shapes and dtypes, which locking does not change."""
    keys = sorted((key.name, key.shape, key.dtype) for key in source.keys.values())
    return str(xxhash.xxh3_128_hexdigest(repr(keys).encode()))


def sample(source: Source, names: Iterable[str]) -> str:
    """A digest of the first rows of some tensors, spread over all layers, as they are stored or will be."""
    packed = packed_like_memory(source)
    digest = xxhash.xxh3_128()
    chosen = list(names)
    for name in chosen[:: math.ceil(len(chosen) / _SAMPLED) or 1]:
        key = packed.key(name)
        rows = packed.read(name, 0, min(_ROWS, key.rows))
        digest.update(name.encode() + encode(rows, key, 0).tobytes())
    return str(digest.hexdigest())
