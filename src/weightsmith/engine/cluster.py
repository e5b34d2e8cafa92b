"""Tasks on a Ray cluster.  Only tasks and checksums travel: workers read and write shared storage themselves."""

from __future__ import annotations

import importlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from weightsmith.core.errors import MissingExtra, WeightsmithError
from weightsmith.engine.runner import Runner, one_thread_each

__all__ = ["RayRunner", "ray_runner"]

T = TypeVar("T")
R = TypeVar("R")

_RETRIES = 5
"""How often a task is started again after its worker or node died; writing the same bytes twice does no harm."""


@contextmanager
def ray_runner(address: str, *, cpus: int, memory: int) -> Iterator[Runner]:
    """A runner on the cluster at `address` ('auto', 'ray://host:10001', 'host:6379').

    'local' starts Ray on this machine, with `cpus` workers.  `memory` is what one task may take, in bytes: a node
    gets as many tasks at once as its processors and its memory allow.

    Raises MissingExtra without Ray, WeightsmithError if there is no cluster or no node has that much memory.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtra("ray", "ray", "--ray") from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address, cpus)
    try:
        largest = max((node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        if largest < memory:
            raise WeightsmithError(
                f"--ray {address}: a task needs {memory / 1e6:,.0f} MB, the largest node has {largest / 1e6:,.0f} MB; "
                "add a larger node"
            )
        yield RayRunner(memory)
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str, cpus: int) -> None:
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address == "local":
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise WeightsmithError(
            f"--ray {address}: no cluster answers ({text}); start one with: ray start --head"
        ) from None


class RayRunner:
    """Applies functions on the workers of the cluster that this process is connected to."""

    remote = True

    def __init__(self, memory: int) -> None:
        self.memory = memory

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        import ray

        cpus = int(ray.cluster_resources().get("CPU", 1))
        call = ray.remote(_call).options(num_cpus=1, memory=self.memory, max_retries=_RETRIES)
        shared = ray.put(function)  # contexts and summaries go to each node once
        window: deque[Any] = deque()
        try:
            for task in tasks:
                window.append(call.remote(shared, task, "torch" in sys.modules))
                if len(window) > 4 * cpus:  # what waits is a few kB each; what runs is bounded by the nodes
                    yield _result(ray, window.popleft())
            while window:
                yield _result(ray, window.popleft())
        finally:
            for left in window:  # after an error nothing new is started; what runs may end, but nobody journals it
                ray.cancel(left, force=False)
            if window:
                ray.wait(list(window), num_returns=len(window), timeout=60)


def _call(function: Callable[[T], R], task: T, torch: bool) -> R:
    if torch:  # before its threads are restrained; fused merges do without it, here as there
        importlib.import_module("torch")
    with one_thread_each():
        return function(task)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception) and not isinstance(cause, ray.exceptions.RayError):
            raise cause from None
        *_, last = str(error).strip().splitlines()
        raise WeightsmithError(
            f"--ray: a worker could not take a task ({last.strip()[:200]}); "
            "every node needs this version of weightsmith and Python, and the recipe's plug-ins"
        ) from None
    except ray.exceptions.RayError as error:
        text = " ".join(str(error).split())[:200]
        raise WeightsmithError(
            f"--ray: a task was lost {_RETRIES + 1} times ({type(error).__name__}: {text}); "
            "see to the cluster, then run again with --resume"
        ) from None
