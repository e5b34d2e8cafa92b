"""How much of a device a run may take: lanes, blocks and buffers, from what is free when the run is planned.

The bytes of lanes are bounded, on the host (staging buffers, `--memory`) and on the device (blocks and the number of
lanes).  `engine.lanes` says who works where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from weightsmith.core.method import Grain
from weightsmith.core.problem import Code, Problems
from weightsmith.core.task import Task, block_size
from weightsmith.devices.accelerator import Accelerator
from weightsmith.devices.place import Lane
from weightsmith.inputs.opened import Inputs
from weightsmith.plan.peak import HELD, measured, task_peak

__all__ = ["LANES", "SHARE", "STAGES", "Fit", "Work", "fitted"]

LANES = 3
"""Lanes per device: one reads, one computes, one writes."""

SHARE = 0.8
"""Of the memory that is free on a device: the rest is for its libraries, and for what an estimate misses."""

STAGES = tuple(1 << n for n in range(24, 19, -1))
"""Bytes of a staging buffer, 16 to 1 MiB: the largest that `--memory` leaves room for."""


@dataclass(frozen=True)
class Fit:
    """How a run uses devices; follows from headers and from what is free.

    lanes      per device
    stage      bytes per staging buffer
    block      elements per block of a merge
    on_cpu     ids of tasks that no device has room for
    device_bytes  predicted peak on each device
    """

    accelerator: Accelerator
    devices: tuple[str, ...]
    lanes: int
    stage: int
    block: int
    on_cpu: frozenset[str] = frozenset()
    device_bytes: int = 0

    @property
    def threads(self) -> int:
        return self.lanes * len(self.devices)

    @property
    def note(self) -> str | None:
        """What the user should know, or None."""
        if not self.on_cpu:
            return None
        first = min(self.on_cpu)
        return (
            f"{len(self.on_cpu)} task{'s have' if len(self.on_cpu) > 1 else ' has'} no room on "
            f"{' and '.join(dict.fromkeys(self.devices))} and will be done on the CPU (the first: {first})"
        )


class Work(NamedTuple):
    """Tasks that are done together (variants of a sweep; else one), and what they read."""

    tasks: tuple[Task, ...]
    inputs: Inputs

    @property
    def merging(self) -> list[Task]:
        """Those of the tasks that are no copies."""
        return [task for task in self.tasks if task.pipeline is not None]

    def on_device(self, block: int, stage: int, measured: int) -> int:
        """Bytes on the device: what one task takes, the others' results, pieces as they arrive."""
        return max(self._one(t, block, measured) for t in self.merging) + self._results(block) + 2 * stage

    def on_host(self, block: int, stage: int) -> int:
        """Bytes of the host beside the staging buffers: histograms, and what does not go through them."""
        count = len(self.inputs.experts)
        found = max((measured(t.pipeline, t.stop - t.start, count) for t in self.merging if t.pipeline), default=0)
        return HELD + found + max(self._unstaged(t, block, stage) for t in self.merging)

    def _results(self, block: int) -> int:
        return sum(sorted(_entries(t, block) * 4 for t in self.merging)[:-1])

    def _one(self, task: Task, block: int, measured: int) -> int:
        assert task.pipeline is not None
        if task.pipeline.grain is not Grain.ELEMENT:
            return task.peak
        count, has_base = len(self.inputs.experts), self.inputs.base is not None
        size = max(block, measured) if task.pipeline.passes(count) else block
        return task_peak(task.key, task.stop - task.start, count, has_base, task.pipeline, size)

    def _unstaged(self, task: Task, block: int, stage: int) -> int:
        """Bytes of one input: rows wider than a buffer, and what is calculated on reading."""
        found = 0
        for _, source in self.inputs.models:
            for key in task.keys if task.group else (task.key,):
                stored = source.key(key.name)
                if source.computes(key.name):
                    found = max(found, int(_entries(task, block) * 4 * (2 + source.read_cost(key.name))))
                elif stored.nbytes // max(stored.rows, 1) > stage:
                    found = max(found, stored.nbytes // max(stored.rows, 1))
        return found


def _entries(task: Task, block: int) -> int:
    """Entries that are worked on at once."""
    rows = task.stop - task.start
    if task.pipeline is not None and task.pipeline.grain is Grain.ELEMENT:
        return min(rows * task.key.row_numel, max(block, task.key.row_numel))
    return sum(key.numel for key in task.keys) if task.group else rows * task.key.row_numel


def fitted(
    work: Sequence[Work],
    accelerator: Accelerator,
    *,
    memory: int | None,
    threads: int | None,
    loaded: int,
    problems: Problems,
) -> tuple[Fit, int]:
    """Lanes, blocks and buffers for some work, and the host's predicted peak in bytes.

    memory   bound on the host's bytes; threads: on the number of lanes
    loaded   bytes of the process beside its tasks, the accelerator's libraries included

    As many lanes as may be, then blocks as large as may be, then large buffers.  What has no room on a device by
    itself in the smallest blocks is done on the CPU, one task at a time.
    """
    devices = accelerator.devices()
    free = [left for device in devices if (left := accelerator.free(device)) is not None]
    budget = int(SHARE * min(free)) if free else None
    # Many tasks are of one kind: one of them stands for all.
    kinds: dict[object, tuple[Work, list[Work]]] = {}
    for one in work:
        if one.merging:
            kind = tuple((t.key.shape, t.key.dtype, t.stop - t.start, t.pipeline, t.peak) for t in one.tasks)
            kinds.setdefault((id(one.inputs), kind), (one, []))[1].append(one)
    most = max((len(one.inputs.models) for one, _ in kinds.values()), default=1)
    smallest, measured = block_size(most), accelerator.measured(most)
    small = {kind: one.on_device(smallest, STAGES[-1], measured) for kind, (one, _) in kinds.items()}
    large = {kind for kind, need in small.items() if budget is not None and need > budget}
    on_cpu = frozenset(t.id for kind in large for one in kinds[kind][1] for t in one.tasks)
    apart = max((t.peak for kind in large for t in kinds[kind][0].tasks), default=0)
    here = [(one, len(alike)) for kind, (one, alike) in kinds.items() if kind not in large]

    def tried(lanes: int, block: int, stage: int) -> tuple[Fit, int]:
        on_device = _largest([(one.on_device(block, stage, measured), often) for one, often in here], lanes)
        fit = Fit(accelerator, devices, lanes, stage, block, on_cpu, on_device)
        host = _largest([(one.on_host(block, stage), often) for one, often in here], fit.threads)
        return fit, loaded + fit.threads * Lane.BUFFERS * stage + host + apart

    wanted = min(LANES, max(1, (threads or LANES * len(devices)) // len(devices)))
    blocks = [smallest * factor for factor in (64, 16, 4, 1)]
    for choice in product(range(wanted, 0, -1), blocks, STAGES):
        fit, peak = tried(*choice)
        if (budget is None or fit.device_bytes <= budget) and (memory is None or peak <= memory):
            return fit, peak
    fit, peak = tried(1, blocks[-1], STAGES[-1])
    problems.say(
        Code.MEMORY,
        "memory",
        f"--memory {(memory or 0) / 1e6:,.0f} MB is too little for {accelerator.kind}: one lane on each device needs "
        f"{peak / 1e6:,.0f} MB of the host's memory",
    )
    return fit, peak


def _largest(needs: Sequence[tuple[int, int]], count: int) -> int:
    """The sum of the `count` largest of (bytes, how often)."""
    total = 0
    for nbytes, often in sorted(needs, reverse=True):
        here = min(often, count)
        total, count = total + here * nbytes, count - here
    return total
