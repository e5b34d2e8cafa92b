"""Where tasks run: one after the other, or on several threads.  A cluster is one more of these."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Protocol, TypeVar

from weightsmith.core.lazy import torch

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["Runner", "SerialRunner", "ThreadRunner", "one_thread_each"]

T = TypeVar("T")
R = TypeVar("R")

SETTLED = ("cos", "erfc", "exp", "expm1", "log", "sin", "sqrt", "tanh")
"""Functions of single numbers that tasks compute with torch."""


class Runner(Protocol):
    """Applies a function to tasks; results come in the order of the tasks, as soon as they can.

    Functions, tasks and results are picklable, so that a runner may cross processes and machines.

    remote  whether it does: then nothing that a function does to its arguments is seen here
    """

    @property
    def remote(self) -> bool: ...

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]: ...


class SerialRunner:
    """In this thread, in order."""

    remote = False

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        return map(function, tasks)


class ThreadRunner:
    """On `threads` threads of this process; torch, numpy and the kernels release the interpreter lock."""

    remote = False

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        tasks = iter(tasks)
        first = list(islice(tasks, 2))
        if len(first) < 2:  # threads take a while to prepare, which a short run is made of
            yield from map(function, first)
            return
        from concurrent.futures import ThreadPoolExecutor

        # The window keeps finished results that wait for an earlier, slower task from piling up.
        window: deque[Future[R]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="weightsmith") as pool:
            try:
                for task in chain(first, tasks):
                    window.append(pool.submit(function, task))
                    if len(window) > 4 * self.threads:
                        yield window.popleft().result()
                while window:
                    yield window.popleft().result()
            except BaseException:
                # Nothing new is started; what runs is waited for, so that no thread writes into closed files.
                pool.shutdown(wait=True, cancel_futures=True)
                raise


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep torch to one thread per task: its sums would otherwise depend on how many it splits them over.

    Threads of ours are not in step either: MKL 2024.2, which torch's wheels carry, looks for a function's code at its
    first call, and if that comes from several threads at once one of them may get code of less than half the digits
    (pytorch/pytorch#188792).  So each function is called once before.
    """
    if "torch" not in sys.modules:  # nothing to restrain, and no reason to wait for the import
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for function in SETTLED:
        for dtype in (torch.float32, torch.float64):
            getattr(torch, function)(torch.ones(1, dtype=dtype))
    try:
        yield
    finally:
        torch.set_num_threads(before)
