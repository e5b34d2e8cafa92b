"""One base with its experts under a suite's tasks: every model is scored once, and what was found is kept.

A score is kept under the hash of all that it depends on: the bytes of the weights (of a merge: of its inputs, with the
recipe and the code that carries it out), the task's version and files, template, dtype and limit.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import PlanError, RecipeError, WeightsmithError, problems_of
from weightsmith.core.problem import Problem
from weightsmith.core.settings import Settings
from weightsmith.inputs.opened import Inputs
from weightsmith.io import system
from weightsmith.io.disk import remove
from weightsmith.jobs.merge import merge_job, run
from weightsmith.jobs.nested import open_inputs
from weightsmith.jobs.sweep import run_sweep
from weightsmith.jobs.verify import lasting
from weightsmith.recipe.schema import ModelRef, Output, Recipe
from weightsmith.study.cache import Ledger, engine, fingerprint
from weightsmith.study.evaluators.found import Found
from weightsmith.study.evaluators.measure import in_memory, measure, version
from weightsmith.study.evaluators.subject import Setting, Subject
from weightsmith.study.grids import Candidate
from weightsmith.study.run import BASE, whole
from weightsmith.study.suite_file import Bound, Rung

__all__ = ["JOINT", "Cost", "Lab", "Scores", "beside", "peak_rss", "scores_of"]

JOINT = "joint"

Opened = Callable[[], contextlib.AbstractContextManager[Subject]]


@dataclass
class Cost:
    """What a row took in this run or, where it was cached, in the run that measured it.  Seconds of wall time."""

    merge_seconds: float = 0.0
    tune_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    read_bytes: int = 0
    write_bytes: int = 0
    peak_bytes: int = 0
    candidates: int = 0

    def tuned(self, took: Cost, merged: bool) -> None:
        """Count a candidate among the tuning; its merge only if that is not counted as the row's own."""
        self.tune_seconds += took.evaluate_seconds + merged * took.merge_seconds
        self.read_bytes += merged * took.read_bytes
        self.write_bytes += merged * took.write_bytes
        self.peak_bytes = max(self.peak_bytes, took.peak_bytes)


Scores = Mapping[str, Found]


def scores_of(found: Scores, tasks: Sequence[Bound], label: str) -> dict[str, float]:
    """Task -> raw score; RecipeError, see `Found.score`, also for one that the task's direction does not take."""
    scores = {one.name: found[one.name].score(one.task.metric, f"{label}, task {one.name}") for one in tasks}
    for one in tasks:
        try:
            one.task.up(scores[one.name])
        except ValueError as error:
            raise RecipeError(f"{label}, task {one.name}: {one.task.metric}: {error}") from None
    return scores


@dataclass(frozen=True)
class Lab:
    """A base, its experts, and the ledger."""

    rung: Rung
    inputs: Inputs
    ledger: Ledger
    room: Path
    settings: Settings
    setting: Setting
    environments: Mapping[str, str]
    step: Callable[[], None] = lambda: None
    extra: Any = None  # what else decides a merge: digests of plug-ins
    _versions: dict[str, Any] = field(default_factory=dict)
    _noted: dict[str, Any] = field(default_factory=dict)  # the inputs' fingerprints, once they are taken

    @classmethod
    def over(cls, rung: Rung, label: str, ledger: Ledger, room: Path, settings: Settings, **more: Any) -> Lab:
        """Open the inputs, reading headers only, and hash their files; PlanError if any cannot be opened."""
        inputs = replace(open_inputs(rung.recipe), full=True)
        if inputs.problems:
            raise PlanError([problem.of(label) for problem in inputs.problems])
        return cls(rung, inputs, ledger, room, settings, **more)

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(self.inputs.experts)

    # -- trained models

    def trained(self, name: str, tasks: Sequence[Bound], cost: Cost | None = None) -> Scores:
        """The base, or an expert."""
        ref = self.rung.recipe.base if name == BASE else self.rung.recipe.models[name]
        assert ref is not None
        return self._scored(["model", self._identity(name)], tasks, lambda: self._as_it_is(name, ref), cost)

    def given(self, label: str, path: str, tasks: Sequence[Bound], cost: Cost | None = None) -> Scores:
        """A checkpoint that is no input of the merges: joint training, a mixture of data."""
        alone = self.rung.recipe.model_copy(
            update={"models": {label: ModelRef(model=path)}, "exclude": (), "rules": ()}
        )
        inputs = replace(open_inputs(alone), full=True)
        if inputs.problems:
            raise PlanError([problem.of(label) for problem in inputs.problems])
        return self._of(alone, inputs).trained(label, tasks, cost)

    def _of(self, recipe: Recipe, inputs: Inputs, noted: Mapping[str, Any] | None = None) -> Lab:
        rung = self.rung.model_copy(update={"recipe": recipe})
        return replace(self, rung=rung, inputs=inputs, _noted={} if noted is None else {"inputs": noted})

    def _identity(self, name: str) -> Any:
        """The bytes of a model's files; where it lies does not count."""
        noted = self._fingerprints()[name]
        contents = noted.get("contents") if isinstance(noted, Mapping) else None
        ref = self.rung.recipe.base if name == BASE else self.rung.recipe.models[name]
        assert ref is not None
        told = ref.model_dump(mode="json", exclude_defaults=True, exclude={"model"} if contents else None)
        return [told, lasting(contents or noted), beside(ref)]

    def _fingerprints(self) -> Mapping[str, Any]:
        if "inputs" not in self._noted:
            self._noted["inputs"] = self.inputs.fingerprints()
        found: Mapping[str, Any] = self._noted["inputs"]
        return found

    @contextlib.contextmanager
    def _as_it_is(self, name: str, ref: ModelRef) -> Iterator[Subject]:
        if (place := whole(ref)) is not None:
            yield Subject(name, place, self.setting)
            return
        alone = self.rung.recipe.model_copy(update={"models": {name: ref}, "exclude": (), "rules": ()})
        with self._of(alone, open_inputs(alone)).merged(alone, name, memory=False) as subject:
            yield subject

    # -- merges

    def part(self, names: Sequence[str]) -> Lab:
        """The same base with some of the experts."""
        models = {name: self.rung.recipe.models[name] for name in names}
        recipe = self.rung.recipe.model_copy(update={"models": models})
        stats = {stat: {n: s for n, s in by.items() if n in models} for stat, by in self.inputs.stats.items()}
        inputs = replace(self.inputs, experts={n: self.inputs.experts[n] for n in names}, stats=stats)
        kept = {BASE, *names, *(f"{name}/{stat}" for name in names for stat in stats)}
        return self._of(recipe, inputs, {key: v for key, v in self._fingerprints().items() if key in kept})

    def recipe(self, candidate: Candidate) -> Recipe:
        return self.rung.recipe.model_copy(update={"method": candidate.stages})

    def problems(self, candidate: Candidate) -> tuple[Problem, ...]:
        """What stands in the way of a merge, from headers alone."""
        try:
            return merge_job(self.recipe(candidate), self.settings, None, self.inputs).plan.problems
        except WeightsmithError as error:
            return problems_of(error)

    def identity(self, candidate: Candidate) -> list[Any]:
        """All that a merge's bytes depend on."""
        recipe = self.recipe(candidate).model_dump(mode="json", exclude_defaults=True, exclude={"models", "base"})
        models = {name: self._identity(name) for name in (BASE, *self.experts)}
        stats = {name: lasting(noted) for name, noted in self._fingerprints().items() if name not in models}
        return ["merge", engine(), recipe, models, stats, str(self.settings.device), self.extra]

    def candidate(
        self,
        candidate: Candidate,
        label: str,
        tasks: Sequence[Bound],
        cost: Cost | None = None,
        folder: Path | None = None,
    ) -> Scores:
        """Scores of a merge, which is made if anything of it is missing.  `folder`: where it lies already."""
        memory = all(in_memory(one.kind) for one in tasks)

        @contextlib.contextmanager
        def opened() -> Iterator[Subject]:
            if folder is not None:
                yield Subject(label, folder, self.setting)
                return
            with self.merged(self.recipe(candidate), label, memory=memory, noted=self.identity(candidate)) as subject:
                yield subject

        found = self._scored(self.identity(candidate), tasks, opened, cost)
        if cost is not None:
            self._add_merge(cost, self.identity(candidate))
        return found

    def known(self, candidate: Candidate, tasks: Sequence[Bound]) -> bool:
        """Whether nothing about a merge has to be measured."""
        identity = self.identity(candidate)
        return all(self._key(identity, one) in self.ledger.known for one in tasks)

    @contextlib.contextmanager
    def merged(self, recipe: Recipe, label: str, *, memory: bool, noted: Any = None) -> Iterator[Subject]:
        """The merged model: in memory where the evaluators take it so and config and tokenizer are the base's."""
        began = time.perf_counter()
        if memory and (home := self._home(recipe)) is not None:
            job = merge_job(recipe, self.settings, None, self.inputs)
            if job.plan.problems:
                raise PlanError(job.plan.problems)
            state = job.tensors(self.settings)
            self._note(noted, time.perf_counter() - began, job.plan.read_bytes, 0, job.plan.peak_bytes)
            yield Subject(label, home, self.setting, state)
            return
        out = self.room / fingerprint(recipe.model_dump(mode="json"))
        try:
            done = run(recipe, out, self.settings, overwrite=True, sources=self.inputs)
            self._note(noted, time.perf_counter() - began, done.read_bytes, done.write_bytes, done.peak_bytes)
            yield Subject(label, out, self.setting)
        finally:
            remove(out)

    def _home(self, recipe: Recipe) -> Path | None:
        """The base's folder, if a merge has its config and tokenizer; None if they may change."""
        plain = recipe.tokenizer is None and recipe.output == Output() and recipe.chat_template is None
        place = whole(recipe.base) if recipe.base is not None and plain else None
        return place if place is not None and (place / "config.json").is_file() else None

    @contextlib.contextmanager
    def swept(self, candidates: Mapping[str, Candidate]) -> Iterator[Mapping[str, Path]]:
        """Several merges of the same inputs, which are read once for all: name -> folder."""
        out = self.room / fingerprint("sweep", {name: self.identity(one) for name, one in candidates.items()})
        began = time.perf_counter()
        try:
            remove(out)  # of a run that was killed
            recipes = {name: self.recipe(one) for name, one in candidates.items()}
            done = run_sweep(recipes, out, self.settings, sources=self.inputs)
            share = len(candidates)
            for one in candidates.values():
                self._note(self.identity(one), (time.perf_counter() - began) / share, done.read_bytes // share,
                           done.write_bytes // share, done.peak_bytes)  # fmt: skip
            yield {name: out / name for name in candidates}
        finally:
            remove(out)

    def _note(self, identity: Any, seconds: float, read: int, written: int, peak: int) -> None:
        """Keep what a merge took; the first time counts."""
        if identity is not None:
            value = {"seconds": round(seconds, 4), "read": read, "written": written, "peak": peak}
            self.ledger.get(fingerprint("merge cost", identity), lambda: value)

    def _add_merge(self, cost: Cost, identity: Any) -> None:
        took = self.ledger.known.get(fingerprint("merge cost", identity), {})
        cost.merge_seconds += took.get("seconds", 0.0)
        cost.read_bytes += took.get("read", 0)
        cost.write_bytes += took.get("written", 0)
        cost.peak_bytes = max(cost.peak_bytes, took.get("peak", 0))

    # -- scores

    def _key(self, identity: Any, one: Bound) -> str:
        """Under which a score is kept."""
        if one.name not in self._versions:
            self._versions[one.name] = self._version(one)
        named = one.name if one.kind == "program" else ""  # a program is told the task's name
        return fingerprint("suite task", identity, self._versions[one.name], named)

    def _version(self, one: Bound) -> Any:
        return version(one.kind, one.spec, self.setting, self.environments)

    def _scored(self, identity: Any, tasks: Sequence[Bound], opened: Opened, cost: Cost | None) -> Scores:
        """Measure what is missing, the model being opened once."""
        keys = {one.name: self._key(identity, one) for one in tasks}
        missing = [one for one in tasks if keys[one.name] not in self.ledger.known]
        if missing:
            with opened() as subject:
                for one in sorted(missing, key=lambda one: one.kind):  # a kind at a time: its model is loaded once
                    self.ledger.get(keys[one.name], lambda one=one: self._measured(subject, one))  # type: ignore[misc]
        for _ in tasks:
            self.step()
        records = {one.name: self.ledger.known[keys[one.name]] for one in tasks}
        if cost is not None:
            cost.evaluate_seconds += sum(record["seconds"] for record in records.values())
        return {name: Found.read(record["found"]) for name, record in records.items()}

    def _measured(self, subject: Subject, one: Bound) -> dict[str, Any]:
        began = time.perf_counter()
        found = measure(subject, one.kind, one.spec, one.name, self.environments)
        # What cannot count is refused before it is kept.
        scores_of({one.name: found}, [one], subject.label)
        if self._version(one) != self._versions[one.name]:
            raise RecipeError(
                f"{subject.label}, task {one.name}: its files changed while the suite ran; run it again, and all "
                "models are measured on the new ones"
            )
        return {"found": found.plain(), "seconds": round(time.perf_counter() - began, 4)}


def beside(ref: ModelRef) -> Any:
    """What decides a score beside the weights: config and tokenizer of a folder."""
    from weightsmith.study.evaluate import digest

    folder = Path(ref.model) if isinstance(ref.model, str) else None
    if folder is None or not folder.is_dir():
        return None
    names = (
        *("config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
        *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json"),
        *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
        # Modules of sentence-transformers.
        *sorted(str(file.relative_to(folder)) for file in system.call(list, folder.glob("[0-9]*_*/*"))),
    )
    return {name: digest(folder / name) for name in names if (folder / name).is_file()}


def peak_rss() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
