"""Samplers of optuna: TPE, Gaussian processes, NSGA-II and NSGA-III, with a journal file as storage.

A sampler's random state is lost when a process ends, so that a resumed study asks for other points.  Here each
generation gets a sampler of its own, seeded by the search's seed and the number of trials, and the journal is cut back
to the end of the last complete generation: what is asked depends on the journal alone.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from weightsmith.core.errors import MissingExtra, OutputError
from weightsmith.io import system
from weightsmith.io.disk import remove, writing
from weightsmith.search.genes import Gene, Point
from weightsmith.search.samplers.base import Sampler, Values, seed_of

__all__ = ["Gp", "Nsga2", "Nsga3", "Tpe"]

FILE = "optuna.journal"


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


class _Optuna(Sampler):
    """A study of optuna."""

    def begin(self) -> None:
        self._library = _optuna()
        self._path = self.folder / FILE
        self._trials: list[Any] = []
        self._study: Any = None
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
            self._clear_lock()
            journal = self._library.storages.journal
            with writing(self._path), _quiet():
                storage = self._library.storages.JournalStorage(journal.JournalFileBackend(str(self._path)))
                if self._lines():  # create_study would write a line each time
                    self._study = self._library.load_study(study_name="search", storage=storage)
                else:
                    directions = ["maximize"] * len(self.goals)
                    self._study = self._library.create_study(
                        study_name="search", storage=storage, directions=directions
                    )
        return self._study

    def _clear_lock(self) -> None:
        """Remove the lock of a process that was killed; the search's own lock says that nobody else is here."""
        with writing(self._path):
            remove(self._path.with_name(self._path.name + ".lock"))

    def ask(self, count: int) -> list[dict[str, Any]]:
        if not self._begun:
            self.restore({"lines": 0})
        with _quiet(), writing(self._path):
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
        with _quiet(), writing(self._path):
            for trial, value in zip(self._trials, values, strict=True):
                if value is None:
                    self._study.tell(trial, state=failed)
                else:
                    self._study.tell(trial, list(value))

    def state(self) -> Any:
        return {"lines": len(self._lines())}  # not bytes: the times in it have none in common

    def restore(self, state: Any) -> None:
        wanted, lines = int(state["lines"]), self._lines()
        self._study, self._trials, self._begun = None, [], True
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
    """A Gaussian process."""

    name = "gp"
    batch = 1
    options: ClassVar[Mapping[str, Any]] = {"startup": 10}

    def sampler(self, seed: int) -> Any:
        with _quiet():
            return self._library.samplers.GPSampler(seed=seed, n_startup_trials=self.given["startup"])


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
