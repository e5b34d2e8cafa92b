"""Samplers of optuna: TPE, Gaussian processes, NSGA-II and NSGA-III, with a journal file as storage.

A sampler's random state is lost when a process ends, so that a resumed study asks for other points.  Here each
generation gets a sampler of its own, seeded by the search's seed and the number of trials, and the journal is cut back
to the end of the last complete generation: what is asked depends on the journal and the state alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from weightsmith.core.errors import MissingExtra, OutputError
from weightsmith.core.lazy import torch
from weightsmith.io import system
from weightsmith.io.disk import sync_file, write_all, writing
from weightsmith.search.genes import Gene, Point
from weightsmith.search.samplers.base import Sampler, Values, seed_of

__all__ = ["Gp", "Nsga2", "Nsga3", "Tpe"]

FILE = "optuna.journal"
_KERNEL = ("inverse_squared_lengthscales", "kernel_scale", "noise_var")
"""What optuna's Gaussian process begins its next fit with."""


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingExtra("optuna", "search", "this sampler") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks that some samplers are experimental: the version is pinned, the use is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Journal:
    """Optuna's operations, a line of JSON each, as its own file backend has them.

    They are put on the disk once a generation: that backend locks and flushes the file at every operation, which takes
    longer than most samplers do.  A search's own lock says that nobody else is here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            lines = system.read_file(path).splitlines() if path.exists() else []
        self._known = [json.loads(line) for line in lines]
        self._written = len(lines)

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self._known[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        # As a file would give them back: optuna compares what it reads.
        self._known += [json.loads(json.dumps(one)) for one in logs]

    def flush(self) -> int:
        """Write down what is new, and give the number of operations."""
        lines = [json.dumps(one, separators=(",", ":")) + "\n" for one in self._known[self._written :]]
        with writing(self.path):
            descriptor = system.call(os.open, self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                write_all(descriptor, "".join(lines).encode())
            finally:
                os.close(descriptor)
            sync_file(self.path)
        self._written = len(self._known)
        return self._written


class _Optuna(Sampler):
    """A study of optuna."""

    def begin(self) -> None:
        self._library = _optuna()
        self._path = self.folder / FILE
        self._trials: list[Any] = []
        self._study: Any = None
        self._journal: _Journal | None = None
        self._begun = False
        self._distributions = {gene.name: self._distribution(gene) for gene in self.space.genes}
        self.sampler(0)  # a wrong option shows now

    def sampler(self, seed: int) -> Any:
        """A fresh sampler of optuna."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        if self.given.get("startup", 0) < self.budget:
            return []
        return [
            f"{self.name}: its first {self.given['startup']} candidates are drawn at random, here all {self.budget}; "
            f"raise evaluations, or lower sampler.{self.name}.startup"
        ]

    def _distribution(self, gene: Gene) -> Any:
        kinds = self._library.distributions
        if gene.values:  # by their numbers: values may be lists
            return kinds.CategoricalDistribution(range(len(gene.values)))
        if gene.integer:
            return kinds.IntDistribution(int(gene.low), int(gene.high), log=gene.log)
        return kinds.FloatDistribution(gene.low, gene.high, log=gene.log)

    def _open(self) -> Any:
        if self._study is None:
            self._journal = _Journal(self._path)
            storage = self._library.storages.JournalStorage(self._journal)
            if self._journal.read_logs(0):  # create_study would write a line each time
                self._study = self._library.load_study(study_name="search", storage=storage)
            else:
                directions = ["maximize"] * len(self.goals)
                self._study = self._library.create_study(study_name="search", storage=storage, directions=directions)
        return self._study

    def ask(self, count: int) -> list[dict[str, Any]]:
        if not self._begun:
            self.restore({"lines": 0})
        with _quiet():
            study = self._open()
            study.sampler = self.sampler(seed_of(self.seed, len(study.get_trials(deepcopy=False))))
            self._trials = [study.ask(self._distributions) for _ in range(count)]
        values = {gene.name: gene.values for gene in self.space.genes if gene.values}
        return [
            {name: values[name][value] if name in values else value for name, value in trial.params.items()}
            for trial in self._trials
        ]

    def tell(self, points: Sequence[Point], values: Sequence[Values]) -> None:
        failed = self._library.trial.TrialState.FAIL
        with _quiet():
            for trial, value in zip(self._trials, values, strict=True):
                if value is None:
                    self._study.tell(trial, state=failed)
                else:
                    self._study.tell(trial, list(value))

    def state(self) -> Any:
        assert self._journal is not None
        return {"lines": self._journal.flush()}  # not bytes: the times in it have none in common

    def restore(self, state: Any) -> None:
        wanted, lines = int(state["lines"]), self._lines()
        self._study, self._journal, self._trials, self._begun = None, None, [], True
        if len(lines) < wanted:
            raise OutputError(
                f"{self._path} is missing or was cut; take the folder's history.jsonl away too to begin "
                "anew (scores stay known)"
            )
        if lines:
            with writing(self._path):
                system.call(os.truncate, self._path, sum(map(len, lines[:wanted])))

    def _lines(self) -> list[bytes]:
        """The journal's operations, a torn one too."""
        with writing(self._path):
            return system.read_file(self._path).splitlines(keepends=True) if self._path.exists() else []


class Tpe(_Optuna):
    """Tree-structured Parzen estimators, of several values at once."""

    name = "tpe"
    batch = 4
    options: ClassVar[Mapping[str, Any]] = {"startup": 10, "candidates": 24}

    def sampler(self, seed: int) -> Any:
        return self._library.samplers.TPESampler(
            seed=seed,
            n_startup_trials=self.given["startup"],
            n_ei_candidates=self.given["candidates"],
            multivariate=True,
            constant_liar=True,
        )


class Gp(_Optuna):
    """A Gaussian process.

    Its kernel is fitted from where it was at the last candidate, as optuna does within one process; the acquisition
    function is climbed from a few places, which takes less than half the time of optuna's ten and finds as much.
    """

    name = "gp"
    batch = 1
    options: ClassVar[Mapping[str, Any]] = {"startup": 10}
    LOOKS: ClassVar[int] = 512
    STARTS: ClassVar[int] = 4

    def begin(self) -> None:
        self._kernels: Any = None
        super().begin()

    def sampler(self, seed: int) -> Any:
        with _quiet():
            made = self._library.samplers.GPSampler(seed=seed, n_startup_trials=self.given["startup"])
        made._n_preliminary_samples, made._n_local_search = self.LOOKS, self.STARTS
        made._gprs_cache_list = self._kernels
        return made

    def ask(self, count: int) -> list[dict[str, Any]]:
        found = super().ask(count)
        self._kernels = self._study.sampler._gprs_cache_list
        return found

    def state(self) -> Any:
        kernels = [[getattr(one, name).tolist() for name in _KERNEL] for one in self._kernels or ()]
        return {**super().state(), "kernels": kernels}

    def restore(self, state: Any) -> None:
        super().restore(state)
        self._kernels = [
            types.SimpleNamespace(
                **{name: torch.tensor(value, dtype=torch.float64) for name, value in zip(_KERNEL, one, strict=True)}
            )
            for one in state.get("kernels", ())
        ] or None


class Nsga2(_Optuna):
    """Non-dominated sorting and crowding."""

    name = "nsga2"
    options: ClassVar[Mapping[str, Any]] = {"population": 16}

    def begin(self) -> None:
        self.batch = self.given["population"]
        super().begin()

    def sampler(self, seed: int) -> Any:
        return self._library.samplers.NSGAIISampler(seed=seed, population_size=self.given["population"])


class Nsga3(Nsga2):
    """Non-dominated sorting and reference points."""

    name = "nsga3"

    def sampler(self, seed: int) -> Any:
        with _quiet():
            return self._library.samplers.NSGAIIISampler(seed=seed, population_size=self.given["population"])
