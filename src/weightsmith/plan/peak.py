"""How many bytes a task takes at once, from the costs of its stages (`plan.costs`): predicted, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence

from weightsmith.core.keys import Key
from weightsmith.core.method import Filter, Grain, MergedFilter, Pipeline
from weightsmith.core.task import block_size, keeps_masks, keeps_rows, one_by_one, row_step
from weightsmith.plan.costs import costs_of

__all__ = ["HELD", "factored_peak", "group_peak", "kernel_peak", "measured", "scratch", "task_peak"]

HELD, HELD_WHOLE = 22_000_000, 30_000_000
"""Bytes that torch's and Python's allocators hold beside what is in use (measured: 3 to 22 MB per thread), and where
whole tensors are worked on: decompositions leave holes between blocks of many sizes."""

FEW = 4
"""What they hold is no more than so many times what is in use: of small tensors next to nothing (measured)."""

HISTOGRAM = 1 << 19
"""Bytes of the counts of 65536 values."""


def task_peak(
    key: Key, rows: int, count: int, has_base: bool, pipeline: Pipeline | None, block: int | None = None
) -> int:
    """Predicted peak bytes of working on `rows` rows: inputs, the float stack, the method's scratch, the result.

    `block`: entries per block, by default those of the CPU.
    """
    block = block or block_size(count + has_base)
    if pipeline is None:
        return 2 * min(rows * key.row_numel, max(block, key.row_numel)) * 8
    used = _used(key, rows, count, has_base, pipeline, block)
    return used + min(HELD if pipeline.grain is Grain.ELEMENT else HELD_WHOLE, FEW * used)


def _used(key: Key, rows: int, count: int, has_base: bool, pipeline: Pipeline, block: int) -> int:
    """What is in use, without what allocators hold beside it."""
    numel = rows * key.row_numel
    if pipeline.grain is Grain.ELEMENT:
        numel = min(numel, row_step(key, block, _spans(key, pipeline)) * key.row_numel)
    width = 8 if key.dtype == "float64" else 4
    columns = max(key.row_numel, 1)
    held = (1 if one_by_one(pipeline) else count) + has_base
    found = measured(pipeline, rows, count, sets=3)
    work = scratch(pipeline, count + has_base, -(-numel // columns), columns, width)
    result = 2 if pipeline.codec is None else 1  # a codec's parts are small, or counted by it
    return max(found, work) + (held + result) * numel * width


def kernel_peak(key: Key, rows: int, stored: int, count: int, has_base: bool, pipeline: Pipeline) -> int:
    """The same of the kernels: stored rows and histograms, no float32 copies.

    stored  bytes of one row of all inputs
    """
    inputs = count + has_base
    block = min(rows, row_step(key, block_size(inputs)))
    kept = (rows if keeps_rows(key, inputs) else block) * stored
    found = measured(pipeline, rows, count, lists=inputs)
    program = pipeline.fused(count)
    before = program.before if program is not None else ()
    # What filters keep that find it out before: a byte for each entry of a block, a bit for each of the tensor.
    masks = sum(one.marks for one in before)
    kept += masks * count * key.row_numel * (block + (rows if keeps_masks(key, count) else block) // 8)
    if any(one.spans for one in before):
        kept += 60 * key.row_numel  # to rank a row
    if program is not None and program.combine.shares is not None:
        found += 4 * (inputs + 3) * key.row_numel  # a row of every input in float64
    return kept + found + 2 * block * key.row_numel * 4 + (2 << 20)


def group_peak(keys: Sequence[Key], units: int, count: int, has_base: bool, pipeline: Pipeline) -> int:
    """The same for all tensors of a group, and of what its method makes of pairs of its units."""
    block = block_size(count + has_base)
    used = sum(_used(key, key.rows, count, has_base, pipeline, block) for key in keys)
    whole = used + min(HELD_WHOLE, FEW * used)
    square = max(costs.square * (costs.side == "units") for costs in map(costs_of, pipeline.stages))
    return whole + int(square * 4 * units**2)


def factored_peak(key: Key, ranks: Sequence[int], pipeline: Pipeline | None) -> int:
    """`task_peak` for experts whose task vectors stay products, of these ranks: there is no stack.

    The base and the result, in between in float64; the factors side by side and what they are decomposed into; and
    where the method has them (`Costs.joint`) the coordinates of every expert in the space of all.
    """
    width, joint = 8 if key.dtype == "float64" else 4, sum(ranks)
    made = 6 * key.numel
    decomposed = 4 * joint * (key.rows + key.row_numel)
    holding = [stage for stage in pipeline.stages if costs_of(stage).joint] if pipeline is not None else []
    copies = (
        5 if any(stage.passes(len(ranks)) for stage in holding) else 3 if holding else 0
    )  # halves; measuring them takes more
    coordinates = copies * len(ranks) * joint * max(key.rows, key.row_numel) // 2
    return (made + decomposed + coordinates) * width


def scratch(pipeline: Pipeline, inputs: int, rows: int, columns: int, width: int = 4) -> int:
    """Peak bytes beside the inputs, which are so many blocks of rows x columns entries of `width` bytes."""
    matrix = rows * columns * width
    squares = {"smaller": min(rows, columns) ** 2, "rows": rows**2, "columns": columns**2, "units": 0}
    each = [costs_of(stage) for stage in pipeline.used]
    most = max((c.scratch * inputs + c.matrix) * matrix + c.square * squares[c.side] * width for c in each)
    filtered = any(isinstance(s, Filter) and not isinstance(s, MergedFilter) for s in pipeline.used)
    between = 0 if len(each) == 1 else inputs if filtered else 1  # what one stage hands to the next
    return int(most) + between * matrix


def measured(pipeline: Pipeline, rows: int, count: int, sets: int = 2, lists: int | None = None) -> int:
    """Peak bytes of what a measuring pass over `rows` rows of a tensor finds.

    sets   of histograms at once: a block's, and the sum so far; or that over the model too
    lists  that are counted, by default the task vectors
    pairs  numbers row by row: as they come, joined, and half summed up
    """
    found = [costs_of(stage) for stage in pipeline.stages if stage.passes(count)]
    lists = lists or count
    counts = HISTOGRAM * sets * lists * max((costs.histograms for costs in found), default=0)
    return counts + any(costs.pairs for costs in found) * 3 * 8 * rows * lists * (lists + 1) // 2


def _spans(key: Key, pipeline: Pipeline) -> list[int]:
    """Of how many elements the blocks are multiples, see `row_step`: those of the parts that a codec makes."""
    return [part.span for part in pipeline.codec.parts(key, ("",))] if pipeline.codec is not None else []
