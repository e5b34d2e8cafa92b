"""A study from its models to its figures: every method is merged, tuned on validation data and scored on test data."""

from __future__ import annotations

import fnmatch
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from weightsmith.core.errors import PlanError, RecipeError, WeightsmithError, did_you_mean, problems_of
from weightsmith.core.keys import depths
from weightsmith.core.lazy import torch
from weightsmith.core.problem import Problem
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.engine.compare import compare_tensors, gathered
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import Source
from weightsmith.jobs.api import merge
from weightsmith.jobs.merge import run
from weightsmith.jobs.nested import open_inputs
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import ModelRef, Recipe
from weightsmith.study.cache import Ledger, engine, fingerprint
from weightsmith.study.evaluate import Scorer
from weightsmith.study.figures import Reference, Scores, mean_over
from weightsmith.study.grids import Candidate, candidates, offered
from weightsmith.study.schema import Study

__all__ = ["BASE", "JOINT", "Bench", "Measured", "chosen_methods", "grouped", "whole"]

BASE, JOINT = "base", "joint"

Methods = Mapping[str, tuple[Candidate, ...]]


@dataclass(frozen=True)
class Measured:
    """Scores of one merge, and what it took.  Seconds of wall and processor time (all threads)."""

    scores: Scores
    merge_seconds: float
    merge_cpu_seconds: float
    evaluate_seconds: float
    peak_bytes: int  # as planned


@dataclass(frozen=True)
class Bench:
    """One study: its inputs, its scorer, and the ledger of what was measured."""

    study: Study
    scorer: Scorer
    inputs: Inputs
    ledger: Ledger
    room: Path  # folder for merged models, each deleted when it is scored
    settings: Settings = DEFAULT
    extra: Any = None  # what else decides a merge: digests of plug-ins

    @classmethod
    def open(cls, study: Study, scorer: Scorer, ledger: Ledger, room: Path, **options: Any) -> Bench:
        """Open the inputs, reading headers only; PlanError if any cannot be opened."""
        inputs = open_inputs(study.recipe)
        if inputs.problems:
            raise PlanError([problem.of(str(study.file)) for problem in inputs.problems])
        return cls(study, scorer, inputs, ledger, room, **options)

    # -- trained models

    def model(self, name: str, split: str) -> Scores:
        """Scores of the base, an expert, or the jointly trained model."""
        recipe, source = self.study.recipe, dict(self.inputs.models).get(name)
        if source is None:  # joint training is no input of the merges
            assert self.study.joint is not None
            path = Path(self.study.joint)
            files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
            identity: Any = [str(path), [[f.stat().st_size, f.stat().st_mtime_ns] for f in files]]
        else:
            path, identity = Path(), self._identity(name)

        def measure() -> Mapping[str, Any]:
            if source is None:
                return {"scores": self.scorer(path, split)}
            ref = recipe.base if name == BASE else recipe.models[name]
            assert ref is not None
            if (place := whole(ref)) is not None:
                return {"scores": self.scorer(place, split)}
            alone = recipe.model_copy(update={"models": {name: ref}, "exclude": (), "rules": ()})
            return self._merged_and_scored(alone, split)

        found = self.ledger.get(fingerprint("model", identity, self.scorer.identity, self.study.scored, split), measure)
        return {str(name): float(score) for name, score in found["scores"].items()}

    def moved(self, name: str) -> float:
        """|expert - base| / |base|, over the tensors that are merged."""
        base, expert = self.inputs.base, self.inputs.experts[name]
        assert base is not None
        key = fingerprint("moved", self._identity(BASE), self._identity(name), self.study.recipe.exclude)
        found = self.ledger.get(key, lambda: {"moved": _moved(base, expert, self.study.recipe.exclude)})
        return float(found["moved"])

    def _identity(self, name: str) -> Any:
        """What tells a model from all others: files of equal name, size and time may lie in two folders."""
        ref = self.study.recipe.base if name == BASE else self.study.recipe.models[name]
        assert ref is not None
        return [ref.model_dump(mode="json"), dict(self.inputs.models)[name].fingerprint()]

    # -- merges

    def recipe(self, candidate: Candidate) -> Recipe:
        """The recipe of a candidate."""
        return self.study.recipe.model_copy(update={"method": candidate.stages})

    def problems(self, candidate: Candidate) -> tuple[Problem, ...]:
        """What stands in the way of a merge, from headers alone."""
        try:
            plan = make_plan(self.recipe(candidate), self.settings, sources=self.inputs, strict=False)
        except WeightsmithError as error:
            return problems_of(error)
        return plan.problems

    def merged(self, candidate: Candidate, split: str) -> Measured:
        """Scores of a merge, which is made if it was not before, and deleted afterwards."""
        recipe = self.recipe(candidate)
        key = fingerprint(
            "merge", engine(), recipe.model_dump(mode="json", exclude_defaults=True), self.inputs.fingerprints(),
            self.scorer.identity, self.study.scored, split, self.settings.device, self.extra,
        )  # fmt: skip
        return Measured(**self.ledger.get(key, lambda: self._merged_and_scored(recipe, split)))

    def _merged_and_scored(self, recipe: Recipe, split: str) -> Mapping[str, Any]:
        out = self.room / fingerprint(str(self.study.file), recipe.model_dump(mode="json"))
        _warm()
        try:
            wall, processor = time.perf_counter(), _processor_seconds()
            done = run(recipe, out, self.settings, overwrite=True)
            merged, merged_processor = time.perf_counter(), _processor_seconds()
            scores = self.scorer(out, split)
            return {
                "scores": scores,
                "merge_seconds": round(merged - wall, 4),
                "merge_cpu_seconds": round(merged_processor - processor, 4),
                "evaluate_seconds": round(time.perf_counter() - merged, 4),
                "peak_bytes": done.peak_bytes,
            }
        finally:
            shutil.rmtree(out, ignore_errors=True)


def whole(ref: ModelRef) -> Path | None:
    """The path of a checkpoint that can be scored as it lies there; None for adapters, views, hub ids and recipes."""
    if not isinstance(ref.model, str) or ref.layers or ref.expert or not (path := Path(ref.model)).exists():
        return None
    return None if (path / "adapter_config.json").exists() else path


def _moved(base: Source, expert: Source, exclude: Sequence[str]) -> float:
    names = [
        name for name, key in base.keys.items()
        if key.floating and name in expert.keys and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)
    ]  # fmt: skip
    return gathered(compare_tensors(base, expert, names)).relative


@cache
def _warm() -> None:
    """Merge four numbers, once: what a process loads for its first merge is not the first method's cost."""
    tiny = [{"w": torch.full((2, 2), float(value))} for value in range(3)]
    for method in ("linear", "ties"):
        merge(tiny[1:], method, base=tiny[0])


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --- which studies belong together, and what is tried on them --------------------------------------


def grouped(studies: Iterable[Study]) -> list[tuple[Study, ...]]:
    """Studies by title, in order of appearance; those of one title repeat each other.

    Raises RecipeError if repetitions differ in more than their models and data.
    """
    groups: dict[str, list[Study]] = {}
    for study in studies:
        groups.setdefault(study.title, []).append(study)
    for first, *others in groups.values():
        for other in others:
            for name in ("tasks", "guards", "score", "higher_is_better", "methods"):
                if getattr(first, name) != getattr(other, name):
                    raise RecipeError(
                        f"{other.file}: {name} differ from those of {first.file}, which has the same title "
                        f"({first.title!r}); give it another title, or make them equal"
                    )
            if other.file.resolve() == first.file.resolve():
                raise RecipeError(f"{other.file}: named twice; a repetition has models of its own")
    return [tuple(group) for group in groups.values()]


def chosen_methods(benches: Sequence[Bench], wanted: Sequence[str]) -> tuple[Methods, dict[str, str]]:
    """Label -> candidates, and what is left out and why.

    Methods that the study or the user names must be possible: PlanError holds every problem.  Where nobody names
    any, all are taken that are.
    """
    first = benches[0]
    named = first.study.methods
    left_out: dict[str, str] = {}
    if named is None:
        statistics_of_all = [s for s, by in first.inputs.stats.items() if set(by) == set(first.inputs.experts)]
        assert first.inputs.base is not None
        has_depth = len(set(depths(first.inputs.base.keys).values())) > 1
        grids, left_out = offered(len(first.study.tasks), statistics_of_all, has_depth)
        methods: dict[str, tuple[Candidate, ...]] = {label: candidates(written) for label, written in grids.items()}
    else:
        methods = dict(named)
    for label in wanted:
        if label not in methods:
            because = f": {left_out[label]}" if label in left_out else did_you_mean(label, methods)
            raise RecipeError(f"--methods: no method {label!r} in this study{because}")
    if wanted:
        methods = {label: methods[label] for label in wanted}
    problems = {label: found for label in methods if (found := _problems(benches, methods[label]))}
    if problems and (wanted or named is not None):
        raise PlanError([problem.of(label) for label, found in problems.items() for problem in found])
    left_out |= {label: found[0].text for label, found in problems.items()}
    return {label: made for label, made in methods.items() if label not in problems}, left_out


def _problems(benches: Sequence[Bench], made: Sequence[Candidate]) -> list[Problem]:
    """Of the first candidate: the others differ in numbers only, whose ranges were checked."""
    return list(dict.fromkeys(problem for bench in benches for problem in bench.problems(made[0])))


# --- the choice ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The candidate with the best mean validation score; `tried` and `failed` are by the candidates' labels."""

    candidate: Candidate | None
    tried: Mapping[str, float]
    failed: Mapping[str, str]
    seconds: float  # of merging and scoring on validation data, all candidates and studies together


def choose(benches: Sequence[Bench], made: Sequence[Candidate], step: Callable[[], None]) -> Choice:
    """Try candidates on validation data.  With one candidate there is nothing to choose, and nothing is tried."""
    if len(made) == 1:
        return Choice(made[0], {}, {}, 0.0)
    tried: dict[str, float] = {}
    failed: dict[str, str] = {}
    seconds = 0.0
    for candidate in made:
        found = []
        for bench in benches:
            try:
                measured = bench.merged(candidate, "validation")
            except RecipeError:
                raise  # of the evaluator: nothing about this candidate
            except WeightsmithError as error:
                failed[candidate.label] = str(error)
                break
            finally:
                step()
            found.append(statistics.fmean(measured.scores[task] for task in bench.study.tasks))
            seconds += measured.merge_seconds + measured.evaluate_seconds
        else:
            tried[candidate.label] = statistics.fmean(found)
    if not tried:
        return Choice(None, tried, failed, seconds)
    best = (max if benches[0].study.higher_is_better else min)(tried.values())
    return Choice(next(c for c in made if tried.get(c.label) == best), tried, failed, seconds)


def references(benches: Sequence[Bench]) -> list[Reference]:
    """Per study, what its merges are measured against."""
    return [
        Reference(
            bench.model(BASE, "test"),
            {task: bench.model(task, "test")[task] for task in bench.study.tasks},
            bench.study.higher_is_better,
        )
        for bench in benches
    ]


def spread(values: Sequence[float | None]) -> float | None:
    """Standard deviation over studies; None for one study."""
    found = [value for value in values if value is not None]
    return statistics.stdev(found) if len(found) > 1 else None


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of those that are there."""
    return mean_over(value for value in values if value is not None)
