"""A search from its file to its history: ask, build, score, tell, write down."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import Faults, OutputError, PlanError, RecipeError, WeightsmithError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.io import system
from weightsmith.io.disk import gigabytes, remove, writing
from weightsmith.io.url import absolute
from weightsmith.io.write.lock import FolderLock
from weightsmith.jobs.scratch import Workshop
from weightsmith.recipe.schema import Recipe
from weightsmith.search.fronts import front
from weightsmith.search.journal import FILE, History
from weightsmith.search.samplers.base import Random, Sampler, Values, seed_of
from weightsmith.search.schema import SearchFile
from weightsmith.search.score import Scorer, scorer
from weightsmith.search.setting import Aim, sampler_of, space_of
from weightsmith.search.space import Space, key_of
from weightsmith.search.trials import Asked, Evaluations, Outcome
from weightsmith.study.cache import Ledger

__all__ = ["Search", "Trial", "prepared"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One candidate.

    scores  score -> its value on the search split; None where it failed, and `failed` says why
    items   on how many items it was scored; None: all
    told    what the sampler was told: one number for each goal, more is better
    """

    number: int
    point: dict[str, Any]
    key: str
    scores: dict[str, float] | None
    failed: str | None = None
    items: int | None = None
    told: list[float] | None = None

    @property
    def whole(self) -> bool:
        """Whether it was scored on all items."""
        return self.scores is not None and self.items is None


@dataclass
class Search:
    """A search whose parts fit together."""

    file: SearchFile
    out: Path
    space: Space
    aim: Aim
    sampler: Sampler
    scorer: Scorer
    evaluations: Evaluations
    start: Recipe
    """The recipe as it is, or where the search begins if it says too little by itself."""
    identity: str
    trials: list[Trial] = field(default_factory=list)

    # -- the search itself

    def run(self, say: Say = lambda text: None) -> None:
        """Score candidates until the budget is spent, from where an earlier run of the same has stopped.

        Raises RecipeError if the recipe as it is cannot be scored: then no candidate could.
        """
        history = History(self.out, self.identity)
        history.read()
        self.trials = [Trial(**trial) for generation in history.generations for trial in generation["trials"]]
        (first,) = self.evaluations.scored([Asked(self.start)])
        if first.failed is not None:
            raise RecipeError(f"the recipe as it is could not be scored, so no candidate is tried: {first.failed}")
        if history.generations:
            self.sampler.restore(history.generations[-1]["state"])
            say(f"taken up behind candidate {len(self.trials)}")
        while (left := self.file.evaluations - len(self.trials)) > 0:
            points = self.sampler.ask(min(self.batch, left))[:left]
            if not points:
                break
            made = self.generation(points, self.trials)
            self.sampler.tell(points, [None if t.failed and not self.sampler.punished else t.told for t in made])
            history.add({"trials": [asdict(trial) for trial in made], "state": self.sampler.state()})
            before, best = self.best(self.trials), self.best([*self.trials, *made])
            self.trials += made
            if best is not None and best is not before and best.told is not None:
                say(f"  candidate {best.number + 1}: {self.spoken(best)}")

    @property
    def batch(self) -> int:
        return self.file.batch or self.sampler.batch

    def generation(self, points: Sequence[dict[str, Any]], known: Sequence[Trial]) -> list[Trial]:
        """Score the points of a generation; `known` are those before it."""
        asked = [self._asked(point) for point in points]
        found = self._halved(asked)
        values = [None if o.scored is None else self.aim.values(o.scored.values) for o, _ in found]
        told = self._told(values, [items for _, items in found], known)
        return [
            Trial(
                len(known) + i,
                point,
                "" if isinstance(one, WeightsmithError) else key_of(one.recipe),
                None if outcome.scored is None else dict(outcome.scored.values),
                outcome.failed,
                items,
                told[i],
            )
            for i, (point, one, (outcome, items)) in enumerate(zip(points, asked, found, strict=True))
        ]

    def _asked(self, point: dict[str, Any]) -> Asked | WeightsmithError:
        try:
            return Asked(self.space.recipe(point))
        except WeightsmithError as error:
            return error

    def _halved(self, asked: Sequence[Asked | WeightsmithError]) -> list[tuple[Outcome, int | None]]:
        """All on few items, the better ones on more, the best on all."""
        found: list[tuple[Outcome, int | None]] = [(Outcome(None), None)] * len(asked)
        alive = list(range(len(asked)))
        halving = self.file.halving
        for items in (*(halving.items if halving is not None else ()), None):
            parts = [one if isinstance(one := asked[i], WeightsmithError) else replace(one, items=items) for i in alive]
            for i, outcome in zip(alive, self.evaluations.scored(parts), strict=True):
                found[i] = (outcome, items)
            if halving is not None and items is not None:
                good = [i for i in alive if found[i][0].scored is not None]
                good.sort(key=lambda i: -self._value(found[i][0]))  # stable: equals in their order
                alive = sorted(good[: math.ceil(halving.keep * len(good))])
        return found

    def _value(self, outcome: Outcome) -> float:
        assert outcome.scored is not None
        return self.aim.values(outcome.scored.values)[0]

    def _told(
        self, values: Sequence[Values], items: Sequence[int | None], known: Sequence[Trial]
    ) -> list[list[float] | None]:
        """What the sampler is told: failures the worst so far, those left behind no more than any kept."""
        kept = [v for v, i in zip(values, items, strict=True) if v is not None and i is None]
        floor = [min(column) for column in zip(*kept, strict=True)] if kept else None
        told: list[list[float] | None] = []
        for value, few in zip(values, items, strict=True):
            if value is None:
                told.append(None)
            elif few is None or floor is None:
                told.append(list(value))
            else:
                told.append([min(pair) for pair in zip(value, floor, strict=True)])
        seen = [one for one in (*(t.told for t in known if t.failed is None), *told) if one is not None]
        worst = [min(column) for column in zip(*seen, strict=True)] if seen else None
        return [worst if one is None else one for one in told]

    # -- what was found

    def best(self, trials: Sequence[Trial]) -> Trial | None:
        """The incumbent: the best of those scored on all items; of a front, that which likes all goals alike."""
        whole = [trial for trial in trials if trial.whole]
        if not whole:
            return None
        if self.aim.weights is None:
            return self.picked(self.front(trials), [1.0] * len(self.aim.goals))
        return max(whole, key=lambda trial: self.aim.values(trial.scores or {})[0])  # the first of equals

    def front(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials that no other dominates, each recipe once, by the first goal."""
        whole = list({trial.key: trial for trial in reversed(trials) if trial.whole}.values())[::-1]
        if not whole:
            return []
        values = np.array([self.aim.values(trial.scores or {}) for trial in whole])
        return [whole[i] for i in sorted(front(values), key=lambda i: (-values[i][0], whole[i].number))]

    def picked(self, trials: Sequence[Trial], weights: Sequence[float]) -> Trial:
        """The trial that a preference likes best, scores as shares of their range on the front."""
        from weightsmith.search.fronts import pick, shares

        values = np.array([self.aim.values(trial.scores or {}) for trial in trials])
        return trials[pick(shares(values), weights)]

    def random(self) -> list[Trial]:
        """As many candidates at random."""
        sampler = Random(self.space, self.aim.names, seed_of(self.file.seed, "random"), {}, self.out, 0)
        trials: list[Trial] = []
        while (left := len(self.trials) - len(trials)) > 0:
            points = sampler.ask(min(self.batch, left))
            trials += self.generation(points, trials)
            sampler.tell(points, [None] * len(points))
        return trials

    def spoken(self, trial: Trial) -> str:
        """Scores in words."""
        scores = trial.scores or {}
        said = ", ".join(f"{name} {scores[name]:.6g}" for name in self.aim.goals)
        if self.aim.weights is None or len(self.aim.goals) == 1:
            return said
        return f"{self.aim.values(scores)[0]:.6g} ({said})"

    def plan(self) -> list[str]:
        """What a run would do, a line each."""
        genes = self.space.genes
        together, peak = self.together
        halving = f", by halving over {', '.join(map(str, self.file.halving.items))} items" if self.file.halving else ""
        return [
            f"sampler {self.sampler.name}: {len(genes)} genes, {self.sampler.most} candidates, {self.batch} a "
            f"generation{halving}",
            f"candidates: {together} built in one pass, predicted peak {gigabytes(peak)}, what the evaluator takes not "
            "counted",
            f"goals: {', '.join(f'{name} ({goal}{self._weight(name)})' for name, goal in self.aim.goals.items())}"
            + (" as a front" if self.aim.weights is None else ""),
            f"resume: the same command goes on, {self.sampler.promise} where the evaluator gives the same scores again",
        ]

    def _weight(self, name: str) -> str:
        return "" if self.file.weights is None else f", weight {self.file.weights.get(name, 0.0):g}"

    @property
    def together(self) -> tuple[int, int]:
        """Candidates that are built in one pass within the bound on memory, and the bytes that takes."""
        count = min(self.file.together, self.batch)
        return self.evaluations.workshop.peak(self.start, count, in_memory=self.scorer.in_memory)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One search per folder at a time; afterwards no candidate is left on the disk."""
        with writing(self.out):
            system.call(self.out.mkdir, parents=True, exist_ok=True)
        lock = FolderLock(self.out / "search.lock", self.out)
        lock.acquire()
        try:
            self.evaluations.workshop.clear()
            yield
        finally:
            with contextlib.suppress(OutputError):
                self.evaluations.workshop.clear()
            lock.release()


def prepared(
    file: SearchFile, out: Path, settings: Settings = DEFAULT, *, score: Scorer | None = None, inputs: Any = None
) -> Search:
    """Open the models, and see that recipe, space, sampler and evaluator fit; nothing is written or scored.

    score   in place of the file's evaluator; inputs: sources at hand, by model name ('base' for the base)

    Raises RecipeError or PlanError with one line for each problem.
    """
    out = absolute(out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder for the results")
    workshop = Workshop(out / "candidates", settings.but(progress=None, resume=False, overwrite=True), inputs)
    opened = workshop.inputs(file.recipe)
    aim, faults = Aim.of(file), Faults()
    with faults:
        if opened.problems:
            raise PlanError(opened.problems)
        space = space_of(file, opened, out)
        with faults:
            sampler = sampler_of(file, space, aim, out, settings)
        workshop.plan(space.recipe(space.begin))
    with faults:
        found = score if score is not None else scorer(file, settings.device)
        if file.halving is not None and (aim.weights is None or not found.halves):
            why = "a front has no best" if aim.weights is None else f"{found.label} cannot be asked for a few items"
            raise RecipeError(f"halving: {why}; leave it out" + ("" if aim.weights is None else ", or take {items} in"))
    faults.raised()
    start = file.recipe
    try:
        workshop.plan(file.recipe)
    except PlanError:
        start = space.recipe(space.begin)
    if file.genome is not None:  # which names no recipe beside it
        start = space.recipe(space.begin)
    ledger = Ledger(out / "scores.jsonl")
    evaluations = Evaluations(found, ledger, workshop, out / "stderr", file.together)
    work = Search(file, out, space, aim, sampler, found, evaluations, start, _identity(file, found, opened, sampler))
    workshop.peak(start, 1, in_memory=found.in_memory)  # a bound on memory that is too low shows now
    return work


def _identity(file: SearchFile, score: Scorer, inputs: Any, sampler: Sampler) -> str:
    """Hash of what the history depends on; a larger budget goes on with the same."""
    told = file.model_dump(mode="json", exclude={"evaluations", "together", "rescore", "controls", "score"})
    return hashlib.sha256(
        json.dumps([told, score.identity, inputs.fingerprints(), sampler.identity], default=str).encode()
    ).hexdigest()


def begin_anew(out: Path) -> None:
    """Forget the history of a search; scores stay known."""
    from weightsmith.search.samplers.by_optuna import FILE as OPTUNA

    with writing(out):
        for name in (FILE, OPTUNA):
            remove(out / name)
