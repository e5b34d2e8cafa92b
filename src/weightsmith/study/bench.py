"""`bench`: studies in, figures out."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError, RecipeError, WeightsmithError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.io.disk import write_file, writing
from weightsmith.io.write.lock import FolderLock
from weightsmith.recipe.text import dumps
from weightsmith.study.cache import Ledger
from weightsmith.study.evaluate import digest, scorer
from weightsmith.study.figures import Reference, Scores
from weightsmith.study.flags import flags
from weightsmith.study.grids import edges, left_alone
from weightsmith.study.orderings import Verdict, compare
from weightsmith.study.run import (
    BASE,
    JOINT,
    Bench,
    Choice,
    Measured,
    choose,
    chosen_methods,
    grouped,
    mean,
    references,
    spread,
)
from weightsmith.study.schema import Study

__all__ = ["Counter", "Result", "Row", "alone", "bench", "file_name", "plain"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One line of a table: means over the studies.

    tasks            task -> score; guards likewise
    score            mean over the tasks
    normalised       score as a share of the expert's own, mean over the tasks; `spread` is its standard deviation
                     over the studies
    gain_kept        (model - base) / (expert - base), mean over the tasks whose expert gained
    forgetting       points lost against the base, on the guards if there are any
    defaults         `normalised` of the same method with what was searched left alone
    edges            parameters whose chosen value lies at the edge of what was tried
    moved            of an expert: |expert - base| / |base|;  flags: what the reader must know of it
    seconds          wall time of one merge; cpu_seconds: its processor time over all threads
    tuning_seconds   wall time of all merges and evaluations on validation data, all studies together
    peak_bytes       memory of the merge, as planned
    """

    name: str
    kind: str  # base, expert, joint, merge
    tasks: Mapping[str, float]
    guards: Mapping[str, float]
    score: float
    normalised: float | None
    spread: float | None
    gain_kept: float | None
    forgetting: float
    moved: float | None = None
    chosen: str = ""
    recipe: str = ""
    defaults: float | None = None
    edges: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    seconds: float | None = None
    cpu_seconds: float | None = None
    tuning_seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """All that was found out about studies of one title."""

    title: str
    about: str
    score_name: str
    higher_is_better: bool
    tasks: tuple[str, ...]
    guards: tuple[str, ...]
    studies: tuple[str, ...]
    rows: tuple[Row, ...]
    tried: Mapping[str, Mapping[str, float]]  # method -> coefficients -> mean validation score
    left_out: Mapping[str, str]  # method -> why
    failed: tuple[str, ...]  # merges that could not be made, a line each
    without_gain: tuple[str, ...]  # tasks whose expert is hardly better than the base: no part of `gain_kept`
    verdicts: tuple[Verdict, ...]

    def of(self, *kinds: str) -> list[Row]:
        """The rows of some kinds."""
        return [row for row in self.rows if row.kind in kinds]


def bench(
    studies: Sequence[Study],
    out: str | Path,
    settings: Settings = DEFAULT,
    *,
    evaluator: str | Path | None = None,
    methods: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    say: Say | None = None,
    **options: Any,
) -> tuple[Result, ...]:
    """Merge with every method, choose coefficients on validation data, score on test data.

    studies    those of one title are repetitions (other seeds): figures are means over them
    out        folder for scores.jsonl, which a repeated or interrupted run goes on from, and for the recipes of the
               chosen merges
    evaluator  python file that defines scores(model, split); it is run.  Needed unless a built-in evaluator is named
    methods    labels of the methods to try; default: those of the study, or all that apply
    plugins    files of methods that were loaded: their text is part of what a score is kept under
    say        takes a line of text for every method
    options    change single settings; `progress` takes (done, total) evaluations

    Raises RecipeError, PlanError or SourceError before anything is merged; what a single merge cannot do is reported
    in the result.
    """
    settings = settings.but(**options)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder for the scores and pages")
    if not studies:
        raise RecipeError("no study; name at least one file or folder")
    extra = [digest(Path(plugin)) for plugin in plugins]
    file = None if evaluator is None else Path(evaluator)
    ledger = Ledger(folder / "scores.jsonl")
    prepared = []
    for group in grouped(studies):
        benches = [
            Bench.open(
                s,
                scorer(s, file, settings.device),
                ledger,
                folder / "merged",
                settings=settings.but(progress=None),
                extra=extra,
            )
            for s in group
        ]
        prepared.append((benches, *chosen_methods(benches, methods)))
    counter = Counter(sum(_evaluations(benches, made.values()) for benches, made, _ in prepared), settings.progress)
    with alone(folder):
        return tuple(
            _result(benches, made, left_out, folder, say or (lambda text: None), counter)
            for benches, made, left_out in prepared
        )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One study per folder at a time; afterwards nothing of a merge is left, interrupted or not."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder / "scores.lock", folder)
    lock.acquire()
    try:
        yield
    finally:
        shutil.rmtree(folder / "merged", ignore_errors=True)
        lock.release()


class Counter:
    """Counts evaluations for a progress bar."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def step(self, count: int = 1) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)


def _evaluations(benches: Sequence[Bench], methods: Any) -> int:
    """How many models are scored: trained ones, candidates, and chosen ones once more on test data."""
    each = len(benches[0].study.tasks) + 2 + sum(1 + (len(made) + 1 if len(made) > 1 else 0) for made in methods)
    return each * len(benches)


def _result(
    benches: Sequence[Bench],
    methods: Mapping[str, Any],
    left_out: Mapping[str, str],
    folder: Path,
    say: Say,
    counter: Counter,
) -> Result:
    study = benches[0].study
    say(f"{study.title}: {len(methods)} methods, {len(study.tasks)} tasks"
        + (f", {len(benches)} repetitions" if len(benches) > 1 else ""))  # fmt: skip
    against = references(benches)
    line = partial(_row, against=against, guards=study.guards)
    rows = [line(BASE, "base", [bench.model(BASE, "test") for bench in benches])]
    for task in study.tasks:
        moved = mean(bench.moved(task) for bench in benches)
        expert = line(f"expert {task}", "expert", [b.model(task, "test") for b in benches], moved=moved)
        lost = [task] if against[0].better(rows[0].tasks[task], expert.tasks[task]) else []
        rows.append(replace(expert, flags=flags(lost)))
    if all(bench.study.joint for bench in benches):
        rows.append(line("joint training", JOINT, [bench.model(JOINT, "test") for bench in benches]))
    counter.step((len(study.tasks) + 2) * len(benches))
    tried, failed, cells = {}, [], {}
    for label, made in methods.items():
        choice = choose(benches, made, counter.step)
        failed += [f"{label}, {which}: {text}" for which, text in choice.failed.items()]
        if choice.candidate is None:
            left_out = {**left_out, label: "no merge of it could be made"}
            say(f"  {label}: no merge of it could be made")
            continue
        found = [bench.merged(choice.candidate, "test") for bench in benches]
        counter.step(len(benches))
        alone = _left_alone(benches, made, against)
        counter.step(len(benches) * (len(made) > 1))
        recipe = folder / "recipes" / file_name(study.title) / f"{file_name(label)}.yaml"
        write_file(recipe, dumps(benches[0].recipe(choice.candidate)))
        rows.append(_merge_row(line, label, choice, found, recipe, edges(made, choice.candidate), alone))
        tried[label] = dict(choice.tried)
        cells[label] = _cells(against, found)
        say(_told(rows[-1], study.score))
    return Result(
        title=study.title,
        about=study.about,
        score_name=study.score,
        higher_is_better=study.higher_is_better,
        tasks=study.tasks,
        guards=study.guards,
        studies=tuple(str(bench.study.file) for bench in benches),
        rows=tuple(rows),
        tried=tried,
        left_out=dict(left_out),
        failed=tuple(failed),
        without_gain=tuple(t for t in study.tasks if not any(t in reference.gaining() for reference in against)),
        verdicts=compare(_complete(cells)),
    )


def _left_alone(benches: Sequence[Bench], made: Sequence[Any], against: Sequence[Reference]) -> float | None:
    """The normalised score on test data with defaults, mean over the studies; None where no such merge can be made."""
    candidate = left_alone(made)
    try:
        found = [bench.merged(candidate, "test") for bench in benches]
    except RecipeError:
        raise  # of the evaluator
    except WeightsmithError:
        return None
    return mean(reference.normalised(one.scores) for reference, one in zip(against, found, strict=True))


def _cells(against: Sequence[Reference], found: Sequence[Measured]) -> list[float]:
    """Normalised scores of one method, study by study and task by task, for paired comparison."""
    by_study = [reference.normalised_by_task(one.scores) for reference, one in zip(against, found, strict=True)]
    return [value for values in by_study for value in values.values()]


def _complete(cells: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Methods with a normalised score for as many tasks as any other: only those can be compared pair by pair."""
    full = max((len(values) for values in cells.values()), default=0)
    return {label: values for label, values in cells.items() if len(values) == full}


def _row(
    name: str, kind: str, models: Sequence[Scores], *, against: Sequence[Reference], guards: Sequence[str], **more: Any
) -> Row:
    """Mean one model's scores, a mapping per study, over the studies."""
    pairs = list(zip(against, models, strict=True))
    normalised = [reference.normalised(model) for reference, model in pairs]
    return Row(
        name=name,
        kind=kind,
        tasks={t: sum(model[t] for model in models) / len(models) for t in against[0].tasks},
        guards={g: sum(model[g] for model in models) / len(models) for g in guards},
        score=sum(reference.score(model) for reference, model in pairs) / len(pairs),
        normalised=mean(normalised),
        spread=spread(normalised),
        gain_kept=mean(reference.gain_kept(model) for reference, model in pairs),
        forgetting=sum(reference.forgetting(model, guards) for reference, model in pairs) / len(pairs),
        **more,
    )


def _merge_row(
    line: Callable[..., Row],
    label: str,
    choice: Choice,
    found: Sequence[Measured],
    recipe: Path,
    outer: tuple[str, ...],
    alone: float | None,
) -> Row:
    assert choice.candidate is not None
    return line(
        label,
        "merge",
        [one.scores for one in found],
        chosen=choice.candidate.label,
        recipe=str(recipe),
        defaults=alone,
        edges=outer,
        seconds=sum(one.merge_seconds for one in found) / len(found),
        cpu_seconds=sum(one.merge_cpu_seconds for one in found) / len(found),
        tuning_seconds=choice.seconds,
        peak_bytes=max(one.peak_bytes for one in found),
    )


def _told(row: Row, score_name: str) -> str:
    share = "" if row.normalised is None else f", {100 * row.normalised:.1f}% of the experts"
    chosen = f" ({row.chosen})" if row.chosen else ""
    return f"  {row.name}{chosen}: {row.score:.4g} {score_name}{share}"


def file_name(words: str) -> str:
    """A plain file name: 'dare | ties' -> 'dare-ties'."""
    return re.sub(r"[^a-z0-9._]+", "-", words.lower()).strip("-.") or "study"


def plain(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as JSON can hold them."""
    return [
        {**asdict(result), "verdicts": [_plain_verdict(verdict) for verdict in result.verdicts]} for result in results
    ]


def _plain_verdict(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict), "pairs": [{**asdict(pair), "verdict": pair.verdict} for pair in verdict.pairs]}
