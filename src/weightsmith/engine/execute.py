"""Carrying out tasks: read rows, measure, merge in float32, check, cast, hand over the bytes.

A bundle is a list of variants of one task (of a sweep; a merge by itself is a bundle of one).  Loops over passes and
blocks are plain; inside a block all variants have their turn, so that what is read and decoded serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import NumericError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.method import GroupMethod, Pipeline
from weightsmith.core.site import Group, Site
from weightsmith.core.task import Task, Way, blocks
from weightsmith.engine.context import Context
from weightsmith.engine.hashes import Hashes
from weightsmith.engine.lengths import Sample
from weightsmith.engine.lost import added, squares_lost
from weightsmith.engine.numeric import cast, encode, refuse_bad, refuse_bad_result, to_float
from weightsmith.engine.passes import Chain, Target, measure, noise_of, program_of, ranges, refuse_bad_inputs
from weightsmith.engine.rows import StoredRows
from weightsmith.engine.sites import Reader
from weightsmith.io.read.source import bits_to_tensor, holds_nonfinite
from weightsmith.io.write.sink import Sink
from weightsmith.kernels.merge import TOGETHER, Merge, available, merged
from weightsmith.plugins import home_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Variant", "carried_out_here", "execute", "look_at"]


@dataclass
class Variant:
    """One task of a bundle, where its rows go, and what is said of them."""

    task: Task
    context: Context
    sink: Sink | None
    told: dict[str, float] = field(default_factory=dict)
    lost: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.task = carried_out_here(self.task)
        self.hashes, self.sample = Hashes(self.task), Sample(self.task, len(self.context.inputs.experts))

    @property
    def pipeline(self) -> Pipeline:
        assert self.task.pipeline is not None
        return self.task.pipeline

    def room(self, start: int, stop: int) -> np.ndarray | None:
        """Where finished rows of the tensor may be made in place."""
        return None if self.sink is None else self.sink.room(self.task.key.name, start, stop)

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        """Hand over finished rows of a tensor, from row `start` on."""
        if self.sink is not None:
            self.sink.write(name, start, bits)
            if self.sink.noted:
                self.hashes.add(name, start, bits)
            self.context.progress(bits.nbytes)

    def record(self) -> dict[str, Any]:
        """Checksums of all parts; what a later run may want to know ('notes'); what this one is to say (the others)."""
        found = self.context.found.get(self.task.pipeline, {}) if self.task.pipeline is not None else {}
        stages = self.task.pipeline.stages if self.task.pipeline is not None else ()
        notes = {s.name: note for i, s in enumerate(stages) if (note := s.notes(found.get(i, {})))}
        said = {"notes": notes, "told": self.told, "lost": self.lost, "length": self.sample.squares()}
        return {"parts": self.hashes.records(), **{kind: what for kind, what in said.items() if what}}


def carried_out_here(task: Task) -> Task:
    """The task in torch where the kernels were planned but this process (a worker of a cluster, say) has none."""
    return replace(task, way=Way.ROWS) if task.way is Way.KERNEL and not available() else task


def execute(bundle: Sequence[Variant]) -> list[dict[str, Any]]:
    """Do tasks over the same rows and return their records."""
    for alike in _alike(bundle):
        _WAYS[alike[0].task.way](alike)
    return [variant.record() for variant in bundle]


def look_at(bundle: Sequence[tuple[Task, Context, Target]]) -> list[Mapping[str, Any]]:
    """What the targets see of their tasks' rows, which are the same.  Blocks have the size of measuring passes."""
    chains = [Chain(carried_out_here(task), context, target) for task, context, target in bundle]
    for alike in _alike(chains):
        first = alike[0]
        rows = StoredRows(first.task.key, first.context, lasting=True) if first.task.way is Way.KERNEL else None
        measure(alike, Reader(len(alike) > 1), rows)
    return [chain.total for chain in chains]


def _alike(bundle: Sequence[Any]) -> list[list[Any]]:
    """The variants (or chains) that read the same in the same way: they go side by side."""
    found: dict[Any, list[Any]] = {}
    for one in bundle:
        context = one.context
        found.setdefault((id(context.inputs), one.task.way, context.seed, context.nonfinite), []).append(one)
    return list(found.values())


# --- the ways a tensor is made -------------------------------------------------------------------


def _copy(variants: Sequence[Variant]) -> None:
    """The stored bytes of one input, cast only where the output dtype differs."""
    for variant in variants:  # what the first has read is in the page cache
        for start, bits in _copied(variant.task, variant.context):
            variant.write(variant.task.keys[0].name, start, bits)


def _copied(task: Task, context: Context) -> Iterator[tuple[int, np.ndarray]]:
    source = context.inputs.experts[task.source] if task.source else context.inputs.base
    assert source is not None
    stored, (out,) = source.key(task.key.name), task.keys
    for start, stop in blocks(task.key, task.start, task.stop, context.merged):
        if stored.dtype == out.dtype and not source.computes(stored.name):
            bits = source.bits(stored.name, start, stop)
            if stored.floating and holds_nonfinite(bits, stored.dtype):
                refuse_bad(to_float(bits_to_tensor(bits, stored.dtype)), stored, task.source or "base", start, context)
            yield start, bits
        else:
            value = source.read(stored.name, start, stop)
            if stored.floating:
                refuse_bad(to_float(value), stored, task.source or "base", start, context)
            yield start, encode(value, out, start)


def _kernel(variants: Sequence[Variant]) -> None:
    """The kernels, straight over the stored bits; the same bytes as `_torch`, several times faster."""
    task, context = variants[0].task, variants[0].context
    rows = StoredRows(task.key, context)
    merges = [Merge(program_of(v.task, v.context), found, noise_of(v.task, v.context))
              for v, found in zip(variants, _measured(variants, None, rows), strict=True)]  # fmt: skip
    for start, stop in blocks(task.key, task.start, task.stop, context.merged):
        stored = rows(start, stop)
        for together in _by_dtype(variants):
            few = [variants[i] for i in together]
            rooms = [variant.room(start, stop) for variant in few]
            made = merged(
                [merges[i] for i in together], stored, few[0].task.key.dtype, start * task.key.row_numel, rooms
            )
            for variant, (out, bad) in zip(few, made, strict=True):
                if not program_of(variant.task, context).wants_base:
                    _refuse_bad_base(task.key, stored.base, start, stop, context)
                if bad:
                    _refuse(variant, start, stop, out)
                if variant.sink is None or variant.sink.noted:
                    variant.sample.of_stored(variant.task.key, start, out, stored)
                variant.write(variant.task.key.name, start, out)


def _by_dtype(variants: Sequence[Variant]) -> list[list[int]]:
    """The variants by the dtype that they are written in, as many at a time as lie side by side."""
    found: dict[str, list[int]] = {}
    for i, variant in enumerate(variants):
        found.setdefault(variant.task.key.dtype, []).append(i)
    return [group[i : i + TOGETHER] for group in found.values() for i in range(0, len(group), TOGETHER)]


def _measured(variants: Sequence[Variant], reader: Reader | None, rows: StoredRows | None) -> list[dict[Any, Any]]:
    """Take all passes over the tensor; results by stage index."""
    chains = [Chain(variant.task, variant.context) for variant in variants]
    measure(chains, reader or Reader(), rows)
    for variant, chain in zip(variants, chains, strict=True):
        for results in chain.found.values():
            for one, result in results.items():
                variant.told |= one.tells(result)
    return [chain.found for chain in chains]


def _torch(variants: Sequence[Variant]) -> None:
    """Blocks of rows, or the whole tensor where the method needs it; into the parts of a codec where there is one."""
    task, context = variants[0].task, variants[0].context
    reader = Reader(shared=len(variants) > 1)
    results = _measured(variants, reader, None)
    for start, stop in ranges(task, context.merged):
        for variant, found in zip(variants, results, strict=True):
            site = replace(reader.site(task.key, variant.task, variant.context, start, stop), told=variant.told)
            if variant.task.way is Way.CODEC:
                _encode(variant, site, found)
            else:
                # Do not bind the merged tensor: a reference would keep it alive.
                _finish(variant, variant.pipeline.merge(site, found), variant.task.key, site)


def _encode(variant: Variant, site: Site, found: Mapping[int, Any]) -> None:
    """The parts that a codec makes of a tensor; every block gives the rows that stand for it.

    What they lose is noted.
    """
    task, context, codec = variant.task, variant.context, variant.pipeline.codec
    assert codec is not None
    made = variant.pipeline.encode(site, found)
    stored: dict[str, Tensor] = {}
    for part in task.encoded:
        low, high = part.rows(site.offset, site.offset + site.stack[0].numel())
        rows = made[part.key.name]
        wanted = (high - low, *part.key.shape[1:]) if part.key.shape else ()
        if tuple(rows.shape) != wanted:
            shapes = f"{list(rows.shape)} for {list(wanted)}"
            raise NumericError(f"{part.key.name}: {_who(variant.pipeline)[0]} returned shape {shapes}")
        if part.key.floating:
            refuse_bad_result(part.key, low, rows, context, *_who(variant.pipeline))
        stored[part.key.name] = cast(rows, part.key, low)
        del rows, made[part.key.name]
    if site.stack[0].numel():
        here = squares_lost(task, codec, site, stored)
        variant.lost = here if variant.lost is None else added([variant.lost, here])
    for part in task.encoded:
        low, _ = part.rows(site.offset, site.offset + site.stack[0].numel())
        _fetch(variant, stored.pop(part.key.name), part.key, low)


def _group(variants: Sequence[Variant]) -> None:
    for variant in variants:
        task, reader = variant.task, Reader()
        sites = {key.name: reader.site(key, task, variant.context, 0, key.rows) for key in task.keys}
        method = variant.pipeline.method
        assert isinstance(method, GroupMethod)
        merged = method.merge_group(Group(task.group, sites))
        for key in task.keys:
            _finish(variant, merged[key.name], key, sites[key.name])


_WAYS = {
    **{Way.COPY: _copy, Way.KERNEL: _kernel, Way.GROUP: _group},
    **dict.fromkeys((Way.ROWS, Way.WHOLE, Way.CODEC), _torch),
}


# --- finished rows -------------------------------------------------------------------------------


def _finish(variant: Variant, out: Tensor, key: Key, site: Site) -> None:
    """Check, cast and hand over the rows of a merged block."""
    if not isinstance(out, torch.Tensor):
        raise NumericError(f"{key.name}: {_who(variant.pipeline)[0]} returned {type(out).__name__}, not a tensor")
    if tuple(out.shape) != site.block_shape:
        shapes = f"{list(out.shape)} for {list(site.block_shape)}"
        raise NumericError(f"{key.name}: {_who(variant.pipeline)[0]} returned shape {shapes}")
    refuse_bad_result(key, site.start, out, variant.context, *_who(variant.pipeline))
    variant.sample.of_site(key, out, site)
    _fetch(variant, cast(out, key, site.start), key, site.start)


def _who(pipeline: Pipeline) -> tuple[str, bool]:
    """Whose fault a wrong result is: the stage that is not built in, with its file, else the last one; which it is."""
    own = [(stage, place) for stage in pipeline.stages if (place := home_of(type(stage)))]
    stage, place = own[-1] if own else (pipeline.stages[-1], "")
    return (f"{stage.name} ({place})", True) if place else (stage.name, False)


def _fetch(variant: Variant, made: Tensor, key: Key, start: int) -> None:
    """Hand over rows as they come back from where they were made."""
    for row, bits in variant.context.place.fetch(made):
        variant.write(key.name, start + row, bits)


def _refuse(variant: Variant, start: int, stop: int, out: np.ndarray) -> None:
    """The kernels only count what is NaN or Inf: ask whose it is, and let torch say what is wrong."""
    task, context = variant.task, variant.context
    refuse_bad_inputs(task.key, start, stop, context)
    _torch([Variant(replace(task, way=Way.ROWS), context, None)])
    refuse_bad_result(task.key, start, to_float(bits_to_tensor(out, task.key.dtype)), context, *_who(variant.pipeline))


def _refuse_bad_base(key: Key, bits: np.ndarray | None, start: int, stop: int, context: Context) -> None:
    """Look at a base that no kernel reads: an input that is broken is so whether the method needs it or not."""
    base = context.inputs.base
    if base is not None and (bits is None or holds_nonfinite(bits, base.key(key.name).dtype)):
        refuse_bad(to_float(base.read(key.name, start, stop)), key, "base", start, context)
