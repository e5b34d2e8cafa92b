"""Measuring passes over one tensor, for one variant or for several side by side.

Every variant has a chain of looks still to take.  In each round all of them take one, in the same walk over the blocks;
looks that are equal are taken once.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.kernel import Look, Program
from weightsmith.core.lazy import torch
from weightsmith.core.method import Grain, Stage
from weightsmith.core.pass_ import Pass, Rows, Scope, Totals, fold
from weightsmith.core.task import Task, blocks
from weightsmith.engine.context import Context, Results, share
from weightsmith.engine.numeric import refuse_bad, to_float
from weightsmith.engine.rows import StoredRows
from weightsmith.engine.sites import Reader
from weightsmith.kernels.cuts import Entries, tensor_cuts
from weightsmith.kernels.looks import Sight, backends
from weightsmith.ops.noise import draws
from weightsmith.ops.select import Cut, Cuts

if TYPE_CHECKING:
    from weightsmith.core.keys import Key

__all__ = ["Chain", "Target", "measure", "noise_of", "program_of", "ranges", "refuse_bad_inputs"]


KNOWN = 1 << 14
"""Bytes up to which the result of a pass over one tensor is kept for the next look over the whole model.

Cuts and factors of a tensor, some numbers for each expert, are far below; ranks of a long vector are found again.
"""


@dataclass(frozen=True)
class Target:
    """A look over the whole model, of which one tensor's part is wanted: stage index, look, results so far."""

    index: int
    look: Pass[Any]
    found: Results


class Chain:
    """The looks that a variant still has to take at one tensor, and what it has found.

    target  the last of them, whose total is wanted as it is; None: all passes over the tensor alone
    """

    def __init__(self, task: Task, context: Context, target: Target | None = None) -> None:
        assert task.pipeline is not None
        self.task, self.context, self.pipeline = task, context, task.pipeline
        known = context.found.get(task.pipeline, {}) if target is None else target.found
        self.found: dict[int, dict[Pass[Any], Any]] = {i: dict(found) for i, found in known.items()}
        self.total: Mapping[str, Any] = {}
        self.index = 0
        self.look: Pass[Any] | None = None
        self._left = deque[tuple[int, Pass[Any]]]()
        self._target = target
        if target is not None and not target.look.applies(task.key):
            return  # nothing to see, so nothing to find out before
        stop = len(task.pipeline.stages) if target is None else target.index
        for i, one in task.pipeline.passes(len(context.inputs.experts)):
            if i >= stop or one.scope is not Scope.TENSOR or not one.applies(task.key):
                continue
            if (asked := (task.id, task.pipeline, i, one)) in context.known:
                self.found.setdefault(i, {})[one] = context.known[asked]
                context.progress(task.nbytes * one.rounds)
            else:
                self._left.append((i, one))
        self._next()

    def _next(self) -> None:
        if self._left:
            self.index, self._asked = self._left.popleft()
            self.look = self._asked
        elif self._target is not None:
            self.index, self.look = self._target.index, self._target.look
        else:
            self.look = None

    def end(self, total: Mapping[str, Any]) -> None:
        """Go on after a look."""
        assert self.look is not None
        if self._target is not None and self.look is self._target.look:
            self.total, self.look = total, None
            return
        found = self.look.end(fold([total]))
        if isinstance(found, Pass):
            self.look = found
        else:
            self.settle(found)

    def settle(self, found: Any) -> None:
        """Go on after a pass."""
        self.found.setdefault(self.index, {})[self._asked] = found
        # The tensor is met again, by the next look over the model or by the merge.
        if self._target is not None and len(pickle.dumps(found)) <= KNOWN:
            self.context.known[self.task.id, self.pipeline, self.index, self._asked] = found
        self._next()

    @property
    def question(self) -> Hashable:
        """Equal for chains whose next looks see the same: after equal stages that know the same of the model."""
        assert self.look is not None
        known = [
            (i, one, pickle.dumps(found))
            for i in range(self.index + 1)
            for one, found in self.found.get(i, {}).items()
            if one.scope is Scope.MODEL
        ]
        return self.before, self.look.seen, tuple(known)

    @property
    def before(self) -> tuple[Stage, ...]:
        """The stages whose work is done before the next look: where they are equal, so is what it sees."""
        return self.pipeline.stages[: self.index]

    @property
    def again(self) -> bool:
        """Whether the same rows are gone over once more after the next look, by another one or by the merge."""
        return self._target is None or self.look is not self._target.look or self.context.marks is not None

    @property
    def ranks(self) -> bool:
        """Whether the kernels find a whole pass at once: cuts over one tensor."""
        look = self.look
        return isinstance(look, Cut) and look.scope is Scope.TENSOR and look.kernel is not None


def measure(chains: Sequence[Chain], reader: Reader, rows: StoredRows | None) -> None:
    """Take all looks of chains over the same rows; with `rows` by the kernels, else in torch."""
    while open_ := [chain for chain in chains if chain.look is not None]:
        if rows is not None and (ranking := [chain for chain in open_ if chain.ranks]):
            _rank([chain for chain in ranking if chain.before == ranking[0].before], rows)
            continue
        alike: dict[Hashable, list[Chain]] = {}
        for chain in open_:
            alike.setdefault(chain.question if len(open_) > 1 else None, []).append(chain)
        firsts = [group[0] for group in alike.values()]
        totals = _by_torch(firsts, reader) if rows is None else _by_kernels(firsts, rows)
        for (first, *others), total in zip(alike.values(), totals, strict=True):
            first.end(total)
            for chain in others:
                chain.context.progress(chain.task.nbytes)
                chain.end(total)


def _by_torch(chains: Sequence[Chain], reader: Reader) -> list[Mapping[str, Any]]:
    task, context = chains[0].task, chains[0].context
    totals = [Totals() for _ in chains]
    for start, stop in ranges(task, context.measured):
        for chain, total in zip(chains, totals, strict=True):
            assert chain.look is not None
            site = reader.site(task.key, chain.task, chain.context, start, stop)
            state = chain.look.see(chain.pipeline.site_for(chain.index, site, chain.found))
            total.add({name: _home(value) for name, value in state.items()}, into=True)
            chain.context.progress(share(task, start, stop))
    return [total.result() for total in totals]


def _by_kernels(chains: Sequence[Chain], rows: StoredRows) -> list[Mapping[str, Any]]:
    task, context = chains[0].task, chains[0].context
    working = backends([_sight(chain) for chain in chains])
    for start, stop in blocks(task.key, task.start, task.stop, context.measured):
        stored = rows(start, stop)
        if sum(backend.add(stored, start * task.key.row_numel) for backend, _ in working):
            refuse_bad_inputs(task.key, start, stop, context)
        for chain in chains:
            chain.context.progress(share(task, start, stop))
    totals: dict[int, Mapping[str, Any]] = {}
    for backend, places in working:
        totals |= dict(zip(places, backend.results(), strict=True))
    return [totals[i] for i in range(len(chains))]


def _sight(chain: Chain) -> Sight[Look]:
    assert chain.look is not None
    look, program = chain.look.kernel, program_of(chain.task, chain.context)
    assert look is not None
    count = len(chain.context.inputs.experts)
    return Sight(look, program, chain.index, count, chain.found, noise_of(chain.task, chain.context), Rows, chain.again)


def _rank(chains: Sequence[Chain], rows: StoredRows) -> None:
    """The cuts that several variants ask for, found together, and in fewer walks than their looks would take."""
    task, context = chains[0].task, chains[0].context
    key, spans = task.key, list(blocks(task.key, task.start, task.stop, context.measured))
    if rows.keeps:
        for span in spans:
            rows(*span)  # so that the sample is taken from memory
    wanted = [chain.look.ranks(key.numel) for chain in chains if isinstance(chain.look, Cut)]
    joint = [[rank for one in wanted for rank in one[i]] for i in range(len(wanted[0]))]
    sight = _sight(chains[0])
    found = tensor_cuts(joint, Entries((key.rows, key.row_numel), rows, spans, sight.job, sight.ordered))
    ends = accumulate((len(one[0]) for one in wanted), initial=0)
    for chain, (first, last) in zip(chains, pairwise(ends), strict=True):
        assert chain.look is not None
        chain.context.progress(task.nbytes * chain.look.rounds)
        threshold, quota, ties = np.moveaxis(found[:, first:last], -1, 0)
        chain.settle(Cuts(threshold, quota, ties, key.numel))


def program_of(task: Task, context: Context) -> Program:
    """What the kernels do for a task of theirs."""
    program = None if task.pipeline is None else task.pipeline.fused(len(context.inputs.experts))
    assert program is not None
    return program


def noise_of(task: Task, context: Context) -> list[np.ndarray | None]:
    """What the kernels need to draw the noise of a task's filters."""
    name, experts = task.key.name, list(context.inputs.experts)
    filters = program_of(task, context).before
    return [draws(context.seed, name, experts, one.salt, one.shares) if one.salt else None for one in filters]


def ranges(task: Task, block: int) -> Iterable[tuple[int, int]]:
    """The row ranges that a task is worked on in."""
    assert task.pipeline is not None
    if task.pipeline.grain is Grain.ELEMENT:
        return blocks(task.key, task.start, task.stop, block, [part.span for part in task.encoded])
    return [(task.start, task.stop)]


def refuse_bad_inputs(key: Key, start: int, stop: int, context: Context) -> None:
    """The kernels only count what is NaN or Inf; ask whose it is."""
    for name, source in context.inputs.models:
        refuse_bad(to_float(source.read(key.name, start, stop)), key, name, start, context)


def _home(found: Any) -> Any:
    """What was seen, on the CPU: devices differ from task to task."""
    if isinstance(found, Rows):
        return Rows(_home(found.values))
    return found.cpu() if isinstance(found, torch.Tensor) else found
