"""Reading a block of every input, as a method sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, overload

from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import Pipeline
from weightsmith.core.site import Site
from weightsmith.core.task import Task, one_by_one, takes_deltas
from weightsmith.engine.context import Context
from weightsmith.engine.kept import Values
from weightsmith.engine.numeric import refuse_bad

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["site_of"]


def site_of(key: Key, task: Task, context: Context, start: int, stop: int) -> Site:
    """Rows start..stop of every input as float32 (float64 where an input is), and what else a method may see."""
    whole, deltas = stop - start == key.rows, takes_deltas(task.pipeline)
    factored = whole and _may_factor(task.pipeline)
    lazily = whole and one_by_one(task.pipeline) and not context.kept.shared
    which = (id(context.inputs), factored, deltas, lazily, context.nonfinite == "allow")
    stack, base, factors = context.kept.values(
        (key.name, start, stop), which, lambda: _values(key, context, start, stop, factored, deltas, lazily)
    )
    each = _OneByOne(key, context, start, stop, base) if lazily and not factors and base is not None else ()
    site = Site(
        key=key,
        stack=stack,
        base=base,
        is_delta=deltas and not factors,
        each=each,
        names=tuple(context.inputs.experts),
        start=start,
        depth=task.depth,
        stats={stat: _stat(stat, key, start, stop, context) for stat in task.stats},
        seed=context.seed,
        factors=factors,
    )
    pipeline = task.pipeline
    if context.kept.shared and pipeline is not None and len(pipeline.stages) == 1 and not pipeline.steps:
        # Nothing but what the question says differs between variants that ask of the same rows.
        place = id(context.inputs), key, start, stop, task.depth, context.seed, context.nonfinite
        return replace(site, once=partial(context.kept.made, place))
    return site


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
        return out

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))


def _may_factor(pipeline: Pipeline | None) -> bool:
    """Whether the first stage takes task vectors as products."""
    return pipeline is not None and pipeline.used[0].traits.factored


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
