"""Who works where: lanes of devices, and the threads that take tasks.

Each device has a few lanes (`devices.place.Lane`), and as many threads as there are lanes in all take tasks one after
another: whichever lane is free does the next one, on whichever device it is.  Nothing else is shared, so results do
not depend on which lane did what.  How many lanes there are, and how large their blocks, is planned (`plan.fit`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

from weightsmith.core.errors import WeightsmithError
from weightsmith.core.method import Grain
from weightsmith.core.task import Task, block_size
from weightsmith.devices.place import CPU, Lane, Place
from weightsmith.plan.fit import Fit

__all__ = ["Lanes"]

R = TypeVar("R")

SMALLEST = block_size(1 << 20)
"""Entries per block below which it does not help to try again."""


class _Gate:
    """Lets several in side by side, or one alone."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._places = threading.Semaphore(width)
        self._alone = threading.Lock()

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._places:
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._alone:
            for _ in range(self._width):
                self._places.acquire()
            try:
                yield
            finally:
                self._places.release(self._width)


@dataclass
class Lanes:
    """The lanes of a run, and who is in them.  Several threads call `do`."""

    fit: Fit
    _free: SimpleQueue[tuple[Lane, _Gate]] = field(default_factory=SimpleQueue)
    _cpu: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        fit = self.fit
        gates = [_Gate(fit.lanes) for _ in fit.devices]
        for _ in range(fit.lanes):  # device by device, so that the first tasks are spread over all of them
            for device, gate in zip(fit.devices, gates, strict=True):
                try:
                    lane = Lane(fit.accelerator, device, fit.stage, fit.block)
                except Exception as error:
                    if not fit.accelerator.ran_out(error):
                        raise
                    raise WeightsmithError(_no_room(device, "staging buffers")) from None
                self._free.put((lane, gate))

    def do(self, tasks: Sequence[Task], work: Callable[[Place], R]) -> R:
        """Do some work on the next lane that is free; copies, and what has no room on a device, on the CPU.

        Where the device runs out of memory nevertheless (others use it too), the work is begun again: alone on its
        device and in ever smaller blocks.  Raises WeightsmithError if that does not help.
        """
        if all(task.pipeline is None for task in tasks):
            return work(CPU)
        if any(task.id in self.fit.on_cpu for task in tasks):
            with self._cpu:
                return work(CPU)
        lane, gate = self._free.get()
        try:
            with gate.shared():
                done, found = self._attempt(lane, work)
            if not done:
                with gate.alone():
                    done, found = self._again(lane, tasks, work)
            if not done or found is None:
                raise WeightsmithError(_no_room(lane.device, tasks[0].key.name))
            return found
        finally:
            self._free.put((lane, gate))

    def _attempt(self, lane: Lane, work: Callable[[Place], R]) -> tuple[bool, R | None]:
        """(whether there was room, the result)."""
        try:
            with lane.using():
                return True, work(lane)
        except Exception as error:
            if not self.fit.accelerator.ran_out(error):
                raise
        # Only here, outside the handler, are the tensors that the error's traceback holds let go.
        return False, None

    def _again(self, lane: Lane, tasks: Sequence[Task], work: Callable[[Place], R]) -> tuple[bool, R | None]:
        cut = any(task.pipeline is not None and task.pipeline.grain is Grain.ELEMENT for task in tasks)
        while True:
            self.fit.accelerator.settle(lane.device)
            last = not cut or lane.block <= SMALLEST
            lane.block = max(lane.block // 4, SMALLEST)
            done, found = self._attempt(lane, work)
            if done or last:
                return done, found

    def close(self) -> None:
        """Wait for all devices, so that no copy runs into memory that is gone."""
        for device in dict.fromkeys(self.fit.devices):
            self.fit.accelerator.settle(device)


def _no_room(device: str, what: str) -> str:
    return (
        f"{device} has too little free memory for {what}, even alone and in the smallest blocks; "
        f"free some of it, or use --device cpu"
    )
