"""Carrying out tasks: read rows, merge in float32, check, cast, hand over the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith.errors import NumericError
from weightsmith.io.sink import Sink
from weightsmith.io.source import bits_to_tensor, tensor_to_bits
from weightsmith.kernel import TrimmedVote
from weightsmith.keys import Key
from weightsmith.lazy import torch
from weightsmith.method import Grain, Pipeline, Rows, Scope
from weightsmith.ops import fused
from weightsmith.run.inputs import Inputs
from weightsmith.run.task import BLOCK, Task, blocks, parts
from weightsmith.site import Group, Site, Summary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Context", "Summaries", "execute", "fold", "is_fused", "measure"]

Summaries = Mapping[int, Summary]


@dataclass(frozen=True)
class Context:
    """What all tasks of a run share.  Picklable if the sources and the sink are.

    summaries    pipeline -> stage index -> summary, from the model-wide measuring passes
    block        elements per block; does not change a byte of the result
    """

    inputs: Inputs
    seed: int = 0
    device: str = "cpu"
    nonfinite: str = "refuse"
    block: int = BLOCK
    summaries: Mapping[Pipeline, Summaries] = field(default_factory=dict)
    progress: Callable[[int], None] = lambda _: None


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
    return {"parts": hashes.records()}


# --- the ways a tensor is made -------------------------------------------------------------------


def _copied(task: Task, context: Context) -> Iterator[tuple[str, int, np.ndarray]]:
    """The stored bytes of one input, cast only where the output dtype differs."""
    source = context.inputs.experts[task.source] if task.source else context.inputs.base
    assert source is not None
    stored, (out,) = source.key(task.key.name), task.keys
    for start, stop in blocks(task.key, task.start, task.stop, context.block):
        if stored.dtype == out.dtype and not source.computes(stored.name):
            yield out.name, start, source.bits(stored.name, start, stop)
        else:
            value = source.read(stored.name, start, stop)
            yield out.name, start, _encode(value, out, start)


def _fused(task: Task, pipeline: Pipeline, context: Context) -> Iterator[tuple[str, int, np.ndarray]]:
    """The kernels, straight over the stored bits; the same bytes as `_merged`, several times faster."""
    spec = pipeline.method.fused(len(context.inputs.experts))
    assert spec is not None
    summaries = _local(task, pipeline, context, context.summaries.get(pipeline, {}), 1)
    for start, stop in blocks(task.key, task.start, task.stop, context.block):
        inputs, base = _stored(task.key, context, start, stop)
        out, bad = fused.merge(spec, inputs, base, task.key.dtype, summaries.get(0, {}), start)
        if bad:
            # The kernels only count; now it is worth asking whose it is.
            _refuse_bad_inputs(task.key, start, stop, context)
            _refuse_bad_result(task.key, start, _to_float(bits_to_tensor(out, task.key.dtype)), context)
        yield task.key.name, start, out


def _stored(key: Key, context: Context, start: int, stop: int) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Rows start..stop of every expert and of the base, as stored."""
    base = context.inputs.base
    experts = [source.bits(key.name, start, stop) for source in context.inputs.experts.values()]
    return experts, None if base is None else base.bits(key.name, start, stop)


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
                _refuse_bad_result(part.key, low, rows, context)
            yield part.key.name, low, _encode(rows.cpu(), part.key, low)


def _grouped(task: Task, pipeline: Pipeline, context: Context) -> Iterator[tuple[str, int, np.ndarray]]:
    sites = {key.name: _site(key, task, pipeline, context, 0, key.rows) for key in task.keys}
    merged = pipeline.method.merge_group(Group(task.group, sites))
    for key in task.keys:
        yield key.name, 0, _finished(merged[key.name], key, sites[key.name], 0, context)


def _finished(out: Tensor, key: Key, site: Site, start: int, context: Context) -> np.ndarray:
    if tuple(out.shape) != site.block_shape:
        raise NumericError(f"{key.name}: the method returned shape {list(out.shape)} for {list(site.block_shape)}")
    _refuse_bad_result(key, start, out, context)
    return _encode(out.cpu(), key, start)


# --- measuring -----------------------------------------------------------------------------------


def measure(task: Task, step: tuple[int, int], context: Context, summaries: Summaries) -> dict[str, Tensor | Rows]:
    """One measuring pass over one task's rows, for a model-wide stage.  Blocks have their fixed size."""
    assert task.pipeline is not None
    index, round = step
    if task.pipeline.stages[index].skips(task.key, round, summaries.get(index, {})):
        return {}
    local = _local(task, task.pipeline, context, summaries, index)
    return _measured(task, task.pipeline, step, context, local)


def fold(totals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add equal names up in the order given; `Rows` are joined on their last axis.  Values: tensors or arrays."""
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
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        a += b  # histograms are large and many, and `a` is this sum's own
        return a
    if isinstance(a, (np.ndarray, np.generic)) != isinstance(b, (np.ndarray, np.generic)):
        return np.asarray(a) + np.asarray(b)  # one tensor went through the kernels, the other did not
    return a + b


def _local(task: Task, pipeline: Pipeline, context: Context, known: Summaries, stop: int) -> dict[int, Summary]:
    """The summaries of the stages before `stop` that are taken over this tensor alone."""
    summaries: dict[int, Summary] = dict(known)
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
    found: list[Mapping[str, Any]] = []
    spec = pipeline.method.fused(len(context.inputs.experts)) if is_fused(task, context) else None
    for start, stop in _ranges(task, pipeline, BLOCK):
        if isinstance(spec, TrimmedVote):
            inputs, base = _stored(task.key, context, start, stop)
            assert base is not None
            found.append(fused.measure_vote(spec, spec.steps[step[1]], inputs, base, summaries.get(0, {}), start))
        else:
            site = _site(task.key, task, pipeline, context, start, stop)
            found.append(pipeline.measure(step, site, summaries))
        context.progress(task.nbytes * (stop - start) // max(task.stop - task.start, 1))
    rows = {name for part in found for name, value in part.items() if isinstance(value, Rows)}
    return {name: Rows(value) if name in rows else value for name, value in fold(found).items()}


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
    stack = torch.empty((len(inputs.experts), *shape), dtype=dtype, device=context.device)
    for i, (name, source) in enumerate(inputs.experts.items()):
        stack[i].copy_(source.read(key.name, start, stop))
        _refuse_bad(stack[i], key, name, start, context)
    base = None
    if inputs.base is not None:
        base = inputs.base.read(key.name, start, stop).to(context.device, dtype)
        _refuse_bad(base, key, "base", start, context)
    return Site(
        key=key,
        stack=stack,
        base=base,
        names=tuple(inputs.experts),
        start=start,
        depth=task.depth,
        stats={stat: _stat(stat, key, start, stop, context) for stat in task.stats},
        seed=context.seed,
    )


def _stat(stat: str, key: Key, start: int, stop: int, context: Context) -> tuple[Tensor, ...]:
    """One statistic per expert: the same rows if it is shaped like the parameter, else all of it."""
    out = []
    for name in context.inputs.experts:
        source = context.inputs.stats[stat][name]
        whole = source.key(key.name).shape != key.shape
        value = source.read(key.name) if whole else source.read(key.name, start, stop)
        out.append(value.to(context.device, torch.float64 if value.dtype == torch.float64 else torch.float32))
        _refuse_bad(out[-1], key, f"the {stat} of {name}", start, context)
    return tuple(out)


# --- numbers -------------------------------------------------------------------------------------


def _refuse_bad(value: Tensor, key: Key, who: str, start: int, context: Context) -> None:
    """Raise if a value is NaN or Inf.  A sum over it tells in one quick pass that all are finite."""
    if context.nonfinite == "allow" or not value.numel() or bool(torch.isfinite(value.sum())):
        return
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        place, what = _first(value, bad, start)
        raise NumericError(
            f"{key.name} in {who} holds {what} at {place} ({int(bad.sum())} in this block); "
            f'repair the input, or set "nonfinite: allow" in the recipe'
        )


def _refuse_bad_inputs(key: Key, start: int, stop: int, context: Context) -> None:
    for name, source in context.inputs.models:
        _refuse_bad(_to_float(source.read(key.name, start, stop)), key, name, start, context)


def _refuse_bad_result(key: Key, start: int, out: Tensor, context: Context) -> None:
    if context.nonfinite == "allow" or not out.numel() or bool(torch.isfinite(out.sum())):
        return
    bad = ~torch.isfinite(out)
    if bool(bad.any()):
        place, what = _first(out, bad, start)
        raise NumericError(
            f"{key.name}: the merge gives {what} at {place} although all inputs are finite; lower the weights"
        )


def _first(value: Tensor, bad: Tensor, start: int) -> tuple[list[int], str]:
    """Index within the tensor of the first bad entry, and what it is."""
    index = [int(i) for i in torch.nonzero(bad)[0]] if bad.ndim else []
    what = str(value[tuple(index)].item()) if index else str(value.item())
    if index:
        index[0] += start
    return index, {"nan": "NaN", "inf": "Inf", "-inf": "-Inf"}.get(what, what)


def _encode(value: Tensor, key: Key, start: int) -> np.ndarray:
    """Cast to the output dtype; a finite number that becomes Inf (or NaN, in fp8) is an error with its count."""
    target = getattr(torch, key.dtype)
    cast = value.to(target)
    if target.is_floating_point and target.itemsize < 4 and value.dtype != target:
        lost = int((torch.isfinite(value) & ~torch.isfinite(_to_float(cast))).sum())
        if lost:
            worst = float(value.abs().max())
            raise NumericError(
                f"{key.name}: {lost} values from row {start} on do not fit into {key.dtype} (largest {worst:.4g}); "
                f"choose output dtype bfloat16 or float32"
            )
    return tensor_to_bits(cast)


def _to_float(value: Tensor) -> Tensor:
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


# --- choosing the fused path ---------------------------------------------------------------------


def is_fused(task: Task, context: Context) -> bool:
    """Whether the kernels may do this task: they know the method, and all is plain bf16 or f32 on the CPU."""
    pipeline = task.pipeline
    if pipeline is None or len(pipeline.stages) != 1 or context.device != "cpu" or context.nonfinite == "allow":
        return False
    spec = pipeline.method.fused(len(context.inputs.experts))
    if spec is None or task.key.dtype not in fused.FUSED_DTYPES or not fused.available():
        return False
    whole = isinstance(spec, TrimmedVote) or spec.deltas
    read = context.inputs.models if whole else tuple(context.inputs.experts.items())
    return all(s.key(task.key.name).dtype in fused.FUSED_DTYPES and not s.computes(task.key.name) for _, s in read)


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
