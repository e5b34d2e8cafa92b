"""From families to rows, tables, plots and the HTML page."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.family import BASE, JOINT, Family, Scores
from demo.merging import METHODS, Bench, choose
from demo.table import Reference, Row, row
from weightsmith.report.figures import Bars, Heat, LabelledBar
from weightsmith.report.heat import heat_map
from weightsmith.report.html import Section, Text, page
from weightsmith.report.picture import Bar, Panel, bars
from weightsmith.report.table import Column, Table, markdown

COLOURS = {"base": "#9aa6b8", "expert": "#b9c3d1", "joint": "#7a8799", "merge": "#3b82c4"}


@dataclass(frozen=True)
class Result:
    """All that is shown of one family."""

    name: str
    title: str
    about: str
    score_name: str
    higher_is_better: bool
    forgetting_means: str
    tasks: tuple[str, ...]
    seeds: int
    rows: tuple[Row, ...]
    tried: dict[str, dict[str, float]]  # method -> choice -> mean validation score


def measured(family: Family, home: Path, say: Callable[[str], None]) -> Result:
    """Checkpoints, merges and scores of a family.  Coefficients are chosen on validation, all rows are on test."""
    scores = Scores(home / "scores.json")
    benches = []
    for seed in family.seeds:
        prefix = f"{family.name}, seed {seed}" if len(family.seeds) > 1 else family.name
        folder = family.checkpoints(home, seed, lambda text, prefix=prefix: say(f"{prefix}: training {text}"))  # type: ignore[misc]
        benches.append(Bench(family, seed, folder, scores))

    def every(name: str) -> list[dict[str, float]]:
        return [bench.model(name, "test") for bench in benches]

    say(f"{family.name}: scoring the base, the experts and joint training")
    experts = {task: every(task) for task in family.tasks}
    references = [
        Reference(base, {task: experts[task][at][task] for task in family.tasks}, family.higher_is_better)
        for at, base in enumerate(every(BASE))
    ]
    rows = [row("base", "base", every(BASE), references, family.guards)]
    rows += [row(f"expert {task}", "expert", experts[task], references, family.guards) for task in family.tasks]
    rows.append(row("joint training", "joint", every(JOINT), references, family.guards))
    tried = {}
    for method in METHODS:
        say(f"{family.name}: merging with {method}")
        best, tried[method] = choose(benches, method)
        found = [bench.merged(method, best, "test") for bench in benches]
        recipe = benches[0].recipe(method, best)
        rows.append(row(method, "merge", found, references, family.guards, best.label, str(recipe)))
        for bench in benches:
            bench.forget()
    return Result(
        name=family.name,
        title=family.title,
        about=family.about,
        score_name=family.score_name,
        higher_is_better=family.higher_is_better,
        forgetting_means=family.forgetting_means,
        tasks=family.tasks,
        seeds=len(family.seeds),
        rows=tuple(rows),
        tried=tried,
    )


def table(result: Result) -> Table:
    """One family's table."""
    decimals = 1 if result.higher_is_better else 3
    columns = [
        Column("name", "model"),
        *(Column(f"task {task}", task, decimals=decimals) for task in result.tasks),
        Column("score", f"mean {result.score_name}", decimals=decimals, meaning="mean over the tasks"),
        Column("normalised", "of expert", percent=True, meaning="score as a share of the expert's own"),
        Column("gain_kept", "gain kept", 0, percent=True, meaning="(model - base) / (expert - base), mean over tasks"),
        Column("spread", "± seeds", 0, percent=True, meaning="standard deviation of the gain kept over the seeds"),
        Column("forgetting", "forgetting", decimals, meaning=result.forgetting_means),
        Column("chosen", "chosen on validation"),
        Column("verdict", "against the base"),
    ]
    better = "higher" if result.higher_is_better else "lower"
    share = "model / expert" if result.higher_is_better else "expert / model"
    seeds = f"Means over {result.seeds} seeds; ± is their standard deviation." if result.seeds > 1 else "One seed."
    return Table(
        title=result.title,
        columns=columns,
        rows=[record(one) for one in result.rows],
        notes=(
            f"Test split; {result.score_name}: {better} is better. "
            f"Of expert: {share}, each task against its own expert. "
            f"Gain kept: (model − base) / (expert − base), mean over the tasks. "
            f"Forgetting: {result.forgetting_means}. {seeds}",
        ),
        group="kind",
        strong=frozenset({best_merge(result)}),
    )


def record(one: Row) -> dict[str, object]:
    """A row as a flat record."""
    return {**vars(one), **{f"task {task}": score for task, score in one.tasks.items()}}


def best_merge(result: Result) -> int:
    """Index of the merge that keeps most."""
    merges = [at for at, one in enumerate(result.rows) if one.kind == "merge"]
    return max(merges, key=lambda at: result.rows[at].gain_kept)


# --- plots -----------------------------------------------------------------------------------------


def gain_figure(result: Result) -> Bars:
    """Bars of the share of the experts' gain that each merge keeps."""
    compared = [one for one in result.rows if one.kind in ("joint", "merge")]
    bars = [
        LabelledBar(
            one.name,
            100 * one.gain_kept,
            f"{100 * one.gain_kept:.0f}%".replace("-", "−"),
            COLOURS[one.kind] if one.gain_kept >= 0 else "#c4573b",
            100 * (one.spread or 0) if result.seeds > 1 else None,
            one.chosen or "no coefficient",
        )
        for one in compared
    ]
    axis = "share of the experts' gain kept (0: the base, 100%: every expert at home)"
    spread = f"Whiskers: standard deviation over {result.seeds} seeds." if result.seeds > 1 else "One seed."
    return Bars(f"{result.title}: gain kept", bars, axis, spread)


def task_figure(result: Result) -> Heat:
    """Every model's score on every task, as a heat map of gains with the scores written in."""
    base = result.rows[0].tasks
    experts = {
        task: next(one for one in result.rows if one.name == f"expert {task}").tasks[task] for task in result.tasks
    }
    return heat_map(
        f"{result.title}: {result.score_name} by task",
        [(one.name, one.tasks) for one in result.rows],
        base,
        experts,
        decimals=1 if result.higher_is_better else 3,
    )


def tried_table(result: Result) -> Table:
    """What was tried on the validation split."""
    chosen = {one.name: one.chosen for one in result.rows}
    rows = [
        {"method": method, "choice": choice, "score": score, "taken": "chosen" if choice == chosen[method] else ""}
        for method, choices in result.tried.items()
        for choice, score in choices.items()
    ]
    columns = (
        Column("method", "method"),
        Column("choice", "coefficients"),
        Column("score", f"mean {result.score_name}", decimals=2 if result.higher_is_better else 4),
        Column("taken", ""),
    )
    strong = frozenset(at for at, one in enumerate(rows) if one["taken"])
    return Table("Coefficients tried on the validation split", columns, rows, group="method", strong=strong)


def document(results: Sequence[Result]) -> str:
    """The whole HTML page."""
    sections: list[Section] = [
        Text(
            "",
            (
                "Each family has a base model and four experts, each of which went on training with one task. "
                "A merge makes one model out of the experts' weights without training; the question is how much "
                "of what the experts gained over the base it keeps. Joint training, shown for comparison, needs the "
                "data of all tasks at once, and takes twice an expert's steps.",
            ),
        )
    ]
    for result in results:
        best = result.rows[best_merge(result)]
        words = f"Best merge: {best.name}" + (f" ({best.chosen})" if best.chosen else "")
        kept = f"{words}; it keeps {100 * best.gain_kept:.0f}% of the experts' gain."
        sections.append(Text(result.title, (result.about, kept)))
        sections += [table(result), gain_figure(result), task_figure(result), tried_table(result)]
    return page("What merging keeps", sections)


def markdown_page(results: Sequence[Result]) -> str:
    """The page of the documentation: the picture and the tables, with day and machine."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [
        "# What the demo measured",
        "`make demo` trains two families of small models, merges each by five methods, and prints these tables; "
        "`python -m demo --markdown` writes this page. Each expert went on from the base with one task. Coefficients "
        "are chosen on a validation split, from small grids; all figures are of the test split. "
        f"{datetime.date.today()}, {cores} cores, torch {torch.__version__.partition('+')[0]}. "
        "On another processor training rounds otherwise: between two machines the digits came out the same, and the "
        "one seed of the text kept up to 8 points more or less. "
        "[All methods on three families](study.md) is the same with more of both.",
        "![Share of the experts' gain that each merge keeps](demo.svg)",
    ]
    for result in results:
        parts += [f"## {result.title}", result.about, markdown(table(result)).rstrip()]
    return "\n\n".join(parts) + "\n"


def picture(results: Sequence[Result]) -> str:
    """The gain kept by each merge, as an SVG."""
    panels = [
        Panel(
            result.title,
            [
                Bar(one.name, one.gain_kept, one.spread, other=one.kind == "joint")
                for one in result.rows
                if one.kind in ("joint", "merge")
            ],
        )
        for result in results
    ]
    return bars(panels, "Share of the experts' gain that one merged model keeps; whiskers: spread over seeds.")
