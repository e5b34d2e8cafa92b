"""Carrying out tasks: read rows, merge in float32, check, cast, hand over the bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith.errors import NumericError
from weightsmith.io.sink import Sink
from weightsmith.io.source import bits_to_tensor, holds_nonfinite
from weightsmith.kernel import TrimmedVote, WeightedSum
from weightsmith.keys import Key
from weightsmith.lazy import torch
from weightsmith.method import Grain, Pipeline, Rows, Scope
from weightsmith.ops import fused
from weightsmith.run.context import Context, Summaries, share
from weightsmith.run.fast import counted, cuts, is_fused, stored_rows, tensor_vote
from weightsmith.run.numeric import encode, refuse_bad, refuse_bad_result, to_float
from weightsmith.run.task import BLOCK, Task, blocks, parts
from weightsmith.site import Group, Site, Summary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["execute", "fold", "measure"]


def execute(task: Task, context: Context, sink: Sink) -> dict[str, Any]:
    """Do one task and return its record: the checksum of every part, and what overflowed in the cast."""
    hashes = _Hashes(task)
    if task.pipeline is None:
        produced: Iterable[tuple[str, int, np.ndarray]] = _copied(task, context)
    elif task.pipeline.grain is Grain.GROUP:
        produced = _grouped(task, task.pipeline, context)
    elif task.pipeline.codec is not None:
        produced = _encoded(task, task.pipeline, context)
    elif is_fused(task, context):
        produced = _fused(task, task.pipeline, context)
    else:
        produced = _merged(task, task.pipeline, context)
    for name, start, bits in produced:
        sink.write(name, start, bits)
        hashes.add(name, start, bits)
        context.progress(bits.nbytes)
    return {"parts": hashes.records(), **_noted(task, context)}


def _noted(task: Task, context: Context) -> dict[str, Any]:
    """What the stages want a later run to know: {'notes': {stage: notes}}, or nothing."""
    if task.pipeline is None:
        return {}
    summaries = context.summaries.get(task.pipeline, {})
    found = {s.name: note for i, s in enumerate(task.pipeline.stages) if (note := s.notes(summaries.get(i, {})))}
    return {"notes": found} if found else {}


# --- the ways a tensor is made -------------------------------------------------------------------


def _copied(task: Task, context: Context) -> Iterator[tuple[str, int, np.ndarray]]:
    """The stored bytes of one input, cast only where the output dtype differs."""
    source = context.inputs.experts[task.source] if task.source else context.inputs.base
    assert source is not None
    stored, (out,) = source.key(task.key.name), task.keys
    for start, stop in blocks(task.key, task.start, task.stop, context.block):
        if stored.dtype == out.dtype and not source.computes(stored.name):
            bits = source.bits(stored.name, start, stop)
            if stored.floating and holds_nonfinite(bits, stored.dtype):
                refuse_bad(to_float(bits_to_tensor(bits, stored.dtype)), stored, task.source or "base", start, context)
            yield out.name, start, bits
        else:
            value = source.read(stored.name, start, stop)
            if stored.floating:
                refuse_bad(to_float(value), stored, task.source or "base", start, context)
            yield out.name, start, encode(value, out, start)


def _fused(task: Task, pipeline: Pipeline, context: Context) -> Iterator[tuple[str, int, np.ndarray]]:
    """The kernels, straight over the stored bits; the same bytes as `_merged`, several times faster."""
    spec = pipeline.method.fused(len(context.inputs.experts))
    assert spec is not None
    context = replace(context, kept={})
    summaries = _local(task, pipeline, context, context.summaries.get(pipeline, {}), 1)
    vote = fused.Vote(spec, summaries.get(0, {})) if isinstance(spec, TrimmedVote) else None
    for start, stop in blocks(task.key, task.start, task.stop, context.block):
        stored = stored_rows(task.key, context, start, stop)
        if isinstance(spec, WeightedSum):
            if not spec.deltas:
                _refuse_bad_base(task.key, stored.base, start, stop, context)
            out, bad = fused.weighted_sum(spec, stored, task.key.dtype)
        else:
            assert vote is not None
            out, bad = vote.merge(stored, task.key.dtype)
        if bad:
            # The kernels only count; now it is worth asking whose it is.
            _refuse_bad_inputs(task.key, start, stop, context)
            site = _site(task.key, task, pipeline, context, start, stop)
            _finished(pipeline.merge(site, summaries), task.key, site, start, context)
            refuse_bad_result(task.key, start, to_float(bits_to_tensor(out, task.key.dtype)), context)
        yield task.key.name, start, out


def _merged(task: Task, pipeline: Pipeline, context: Context) -> Iterator[tuple[str, int, np.ndarray]]:
    """The torch path: blocks of rows, or the whole tensor where the method needs it."""
    summaries = _local(task, pipeline, context, context.summaries.get(pipeline, {}), len(pipeline.stages))
    for start, stop in _ranges(task, pipeline, context.block):
        site = _site(task.key, task, pipeline, context, start, stop)
        out = pipeline.merge(site, summaries)
        yield task.key.name, start, _finished(out, task.key, site, start, context)


def _encoded(task: Task, pipeline: Pipeline, context: Context) -> Iterator[tuple[str, int, np.ndarray]]:
    """The parts that a codec makes of a tensor; every block gives the rows that stand for it."""
    summaries = _local(task, pipeline, context, context.summaries.get(pipeline, {}), len(pipeline.stages))
    for start, stop in _ranges(task, pipeline, context.block):
        site = _site(task.key, task, pipeline, context, start, stop)
        made = pipeline.encode(site, summaries)
        for part in task.encoded:
            low, high = part.rows(site.offset, site.offset + site.stack[0].numel())
            rows = made[part.key.name]
            wanted = (high - low, *part.key.shape[1:]) if part.key.shape else ()
            if tuple(rows.shape) != wanted:
                raise NumericError(f"{part.key.name}: the codec returned shape {list(rows.shape)} for {list(wanted)}")
            if part.key.floating:
                refuse_bad_result(part.key, low, rows, context)
            yield part.key.name, low, encode(rows.cpu(), part.key, low)


def _grouped(task: Task, pipeline: Pipeline, context: Context) -> Iterator[tuple[str, int, np.ndarray]]:
    sites = {key.name: _site(key, task, pipeline, context, 0, key.rows) for key in task.keys}
    merged = pipeline.method.merge_group(Group(task.group, sites))
    for key in task.keys:
        yield key.name, 0, _finished(merged[key.name], key, sites[key.name], 0, context)


def _finished(out: Tensor, key: Key, site: Site, start: int, context: Context) -> np.ndarray:
    if tuple(out.shape) != site.block_shape:
        raise NumericError(f"{key.name}: the method returned shape {list(out.shape)} for {list(site.block_shape)}")
    refuse_bad_result(key, start, out, context)
    return encode(out.cpu(), key, start)


# --- measuring -----------------------------------------------------------------------------------


def measure(task: Task, step: tuple[int, int], context: Context, summaries: Summaries) -> dict[str, Tensor | Rows]:
    """One measuring pass over one task's rows, for a model-wide stage.  Blocks have their fixed size."""
    assert task.pipeline is not None
    index, round = step
    if task.pipeline.stages[index].skips(task.key, round, summaries.get(index, {})):
        return {}
    context = replace(context, kept={})
    local = _local(task, task.pipeline, context, summaries, index)
    return _measured(task, task.pipeline, step, context, local)


def fold(totals: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add equal names up in the order given; `Rows` are joined on their last axis.  Values: tensors or arrays.

    Takes one at a time: a histogram per block of a large tensor would be a gigabyte.
    """
    out: dict[str, Any] = {}
    joined: dict[str, list[Any]] = {}
    for total in totals:
        for name, value in total.items():
            if isinstance(value, Rows):
                joined.setdefault(name, []).append(value.values)
            else:
                out[name] = _sum(out[name], value) if name in out else value
    for name, values in joined.items():
        plain = all(isinstance(v, np.ndarray) for v in values)
        out[name] = np.concatenate(values, -1) if plain else torch.cat([torch.as_tensor(v) for v in values], -1)
    return out


def _sum(a: Any, b: Any) -> Any:
    if isinstance(a, (np.ndarray, np.generic)) != isinstance(b, (np.ndarray, np.generic)):
        return np.asarray(a) + np.asarray(b)  # one tensor went through the kernels, the other did not
    return a + b


def _local(task: Task, pipeline: Pipeline, context: Context, known: Summaries, stop: int) -> dict[int, Summary]:
    """The summaries of the stages before `stop` that are taken over this tensor alone."""
    summaries: dict[int, Summary] = dict(known)
    vote = tensor_vote(task, pipeline, context)
    if vote is not None:
        return {**summaries, 0: cuts(task, vote, context)}
    for index, stage in enumerate(pipeline.stages[:stop]):
        if stage.scope is not Scope.TENSOR:
            continue
        for round in range(stage.rounds):
            if stage.skips(task.key, round, summaries.get(index, {})):
                continue
            total = fold([_measured(task, pipeline, (index, round), context, summaries)])
            summaries[index] = stage.digest(total, round, summaries.get(index, {}))
    return summaries


def _measured(
    task: Task, pipeline: Pipeline, step: tuple[int, int], context: Context, summaries: Summaries
) -> dict[str, Tensor | Rows]:
    if is_fused(task, context):
        return counted(task, pipeline, step[1], context, summaries.get(0, {}))
    joined: set[str] = set()

    def passes() -> Iterator[Mapping[str, Any]]:
        for start, stop in _ranges(task, pipeline, BLOCK):
            site = _site(task.key, task, pipeline, context, start, stop)
            part = pipeline.measure(step, site, summaries)
            joined.update(name for name, value in part.items() if isinstance(value, Rows))
            context.progress(share(task, start, stop))
            yield part

    return {name: Rows(value) if name in joined else value for name, value in fold(passes()).items()}


# --- sites ---------------------------------------------------------------------------------------


def _ranges(task: Task, pipeline: Pipeline, block: int) -> Iterable[tuple[int, int]]:
    if pipeline.grain is Grain.ELEMENT:
        return blocks(task.key, task.start, task.stop, block, [part.span for part in task.encoded])
    return [(task.start, task.stop)]


def _site(key: Key, task: Task, pipeline: Pipeline, context: Context, start: int, stop: int) -> Site:
    """Read rows start..stop of every input as float32 (float64 where an input is)."""
    inputs = context.inputs
    wide = any(s.key(key.name).dtype == "float64" for _, s in inputs.models)
    dtype = torch.float64 if wide else torch.float32
    shape = (stop - start, *key.shape[1:]) if key.shape else ()
    factors = _factors(key, task.pipeline, context, dtype) if stop - start == key.rows else ()
    stack = torch.empty((len(inputs.experts), *shape), dtype=dtype, device="meta" if factors else context.device)
    for i, (name, source) in enumerate(inputs.experts.items()):
        if not factors:
            stack[i].copy_(source.read(key.name, start, stop))
            refuse_bad(stack[i], key, name, start, context)
    base = None
    if inputs.base is not None:
        base = inputs.base.read(key.name, start, stop).to(context.device, dtype)
        refuse_bad(base, key, "base", start, context)
    return Site(
        key=key,
        stack=stack,
        base=base,
        names=tuple(inputs.experts),
        start=start,
        depth=task.depth,
        stats={stat: _stat(stat, key, start, stop, context) for stat in task.stats},
        seed=context.seed,
        factors=factors,
    )


def _factors(
    key: Key, pipeline: Pipeline | None, context: Context, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Every expert's task vector as a product, if the first stage takes that and all of them have it."""
    base = context.inputs.base
    if base is None or pipeline is None:
        return ()
    alone = pipeline.codec is not None and pipeline.codec.traits.alone
    if not pipeline.stages[-1 if alone else 0].traits.factored:
        return ()
    out = []
    for name, source in context.inputs.experts.items():
        pair = source.factors(key.name, base)
        if pair is None:
            return ()
        left, right = (side.to(context.device, dtype) for side in pair)
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
        value = source.read(key.name) if whole else source.read(key.name, start, stop)
        out.append(value.to(context.device, torch.float64 if value.dtype == torch.float64 else torch.float32))
        refuse_bad(out[-1], key, f"the {stat} of {name}", 0 if whole else start, context)
    return tuple(out)


def _refuse_bad_base(key: Key, bits: np.ndarray | None, start: int, stop: int, context: Context) -> None:
    """Look at a base that no kernel reads: an input that is broken is so whether the method needs it or not."""
    base = context.inputs.base
    if base is not None and (bits is None or holds_nonfinite(bits, base.key(key.name).dtype)):
        refuse_bad(to_float(base.read(key.name, start, stop)), key, "base", start, context)


def _refuse_bad_inputs(key: Key, start: int, stop: int, context: Context) -> None:
    for name, source in context.inputs.models:
        refuse_bad(to_float(source.read(key.name, start, stop)), key, name, start, context)


# --- checksums -----------------------------------------------------------------------------------


class _Hashes:
    """xxh3-128 of every part of a task's tensors, fed in row order."""

    def __init__(self, task: Task) -> None:
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}
        whole = task.group or (task.start, task.stop) == (0, task.key.rows)
        width = task.key.row_numel
        cut = {part.key.name: part.rows(task.start * width, task.stop * width) for part in task.encoded}
        for key in task.keys:
            ranges = parts(key) if whole else [cut.get(key.name, (task.start, task.stop))]
            self._parts[key.name] = [(low, high, xxhash.xxh3_128()) for low, high in ranges]

    def add(self, name: str, start: int, bits: np.ndarray) -> None:
        rows = bits.shape[0] if bits.ndim else 1
        for low, high, digest in self._parts[name]:
            first, last = max(low, start), min(high, start + rows)
            if first < last:
                piece = bits[first - start : last - start] if bits.ndim else bits
                digest.update(np.ascontiguousarray(piece).view(np.uint8).data if piece.ndim else piece.tobytes())

    def records(self) -> list[list[Any]]:
        return [[n, low, high, d.hexdigest()] for n, found in self._parts.items() for low, high, d in found]
