"""Reading a block of every input, as a method sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import Factored
from weightsmith.core.site import Site
from weightsmith.core.task import Task, one_by_one, takes_deltas
from weightsmith.engine.context import Context
from weightsmith.engine.lengths import Kept
from weightsmith.engine.numeric import refuse_bad

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reader"]


Values = tuple["Tensor", "Tensor | None", tuple[tuple["Tensor", "Tensor"], ...]]
"""Stack, base and factors of a site."""


class Reader:
    """Reads blocks as float tensors; the latest block is kept, for whoever else asks for it.

    shared  several variants ask: worth keeping what one alone would read twice rather than hold
    """

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self._block: tuple[str, int, int] | None = None
        self._values: dict[Any, Values] = {}
        self._made: dict[Any, Any] = {}

    def site(self, key: Key, task: Task, context: Context, start: int, stop: int) -> Site:
        """Rows start..stop of every input as float32 (float64 where an input is), and what else a method may see."""
        if self._block != (key.name, start, stop):
            self._values.clear()
            self._made.clear()
            self._block = (key.name, start, stop)
        pipeline = task.pipeline
        whole, deltas = stop - start == key.rows, takes_deltas(pipeline)
        factored = whole and pipeline is not None and isinstance(pipeline.used[0], Factored)
        lazily = whole and one_by_one(pipeline) and not self.shared
        which = factored, deltas, lazily
        if which not in self._values:
            self._values[which] = _values(key, context, start, stop, *which)
        stack, base, factors = self._values[which]
        site = Site(
            key=key,
            stack=stack,
            base=base,
            is_delta=deltas and not factors,
            each=_OneByOne(key, context, start, stop, base, Kept(key, len(context.inputs.experts), start, stop))
            if lazily and not factors and base is not None
            else (),
            names=tuple(context.inputs.experts),
            start=start,
            depth=task.depth,
            stats={stat: _stat(stat, key, start, stop, context) for stat in task.stats},
            seed=context.seed,
            factors=factors,
        )
        if self.shared and pipeline is not None and len(pipeline.stages) == 1:
            return replace(site, once=self._once)
        return site

    def _once(self, question: Any, make: Callable[[], Any]) -> Any:
        """What the first variant that asked this of the block has made."""
        if question not in self._made:
            self._made[question] = make()
        return self._made[question]


def _values(key: Key, context: Context, start: int, stop: int, factored: bool, deltas: bool, lazily: bool) -> Values:
    """Read and check one block of every input; lazily: of the base only."""
    inputs = context.inputs
    wide = any(s.key(key.name).dtype == "float64" for _, s in inputs.models)
    dtype = torch.float64 if wide else torch.float32
    shape = (stop - start, *key.shape[1:]) if key.shape else ()
    factors = _factors(key, context, dtype) if factored else ()
    held, place = not factors and not lazily, context.place
    stack = torch.empty((len(inputs.experts), *shape), dtype=dtype, device=place.device if held else "meta")
    read = inputs.experts if held else {}
    for i, source in enumerate(read.values()):
        place.fill(stack[i], source, key.name, start, stop)
    base = None if inputs.base is None else place.load(inputs.base, key.name, start, stop, dtype)
    for i, name in enumerate(read):  # only now: a device copies and computes while the next rows are read
        refuse_bad(stack[i], key, name, start, context)
    if base is not None:
        refuse_bad(base, key, "base", start, context)
        if deltas and held:
            stack -= base
    return stack, base, factors


@dataclass(frozen=True, eq=False)
class _OneByOne(Sequence["Tensor"]):
    """The task vectors of rows start..stop, read when they are asked for."""

    key: Key
    context: Context
    start: int
    stop: int
    base: Tensor
    kept: Kept

    def __len__(self) -> int:
        return len(self.context.inputs.experts)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, source = list(self.context.inputs.experts.items())[index]
        out = torch.empty_like(self.base)
        self.context.place.fill(out, source, self.key.name, self.start, self.stop)
        refuse_bad(out, self.key, name, self.start, self.context)
        out -= self.base
        self.kept.keep(index, out)
        return out

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))


def _factors(key: Key, context: Context, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], ...]:
    """Every expert's task vector as a product, if all of them have it."""
    base = context.inputs.base
    if base is None:
        return ()
    out = []
    for name, source in context.inputs.experts.items():
        product = source.factors(key.name, base)
        if product is None:
            return ()
        left, right = (context.place.bring(side, dtype) for side in product.read())
        for side in (left, right):
            refuse_bad(side, key, f"the adapter of {name}", 0, context)
        out.append((left, right))
    return tuple(out)


def _stat(stat: str, key: Key, start: int, stop: int, context: Context) -> tuple[Tensor, ...]:
    """One statistic per expert: the same rows if it is shaped like the parameter, else all of it."""
    out = []
    for name in context.inputs.experts:
        source = context.inputs.stats[stat][name]
        whole = source.key(key.name).shape != key.shape
        rows = (0, source.key(key.name).rows) if whole else (start, stop)
        dtype = torch.float64 if source.key(key.name).dtype == "float64" else torch.float32
        out.append(context.place.load(source, key.name, *rows, dtype))
        refuse_bad(out[-1], key, f"the {stat} of {name}", 0 if whole else start, context)
    return tuple(out)
