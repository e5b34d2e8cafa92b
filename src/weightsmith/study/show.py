"""Figures of a study as tables, plots, one HTML page, Markdown and an SVG picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weightsmith.report.figures import Bars, Heat, LabelledBar, Points
from weightsmith.report.heat import heat_map
from weightsmith.report.html import Section, Text, page
from weightsmith.report.picture import Bar, Panel, bars
from weightsmith.report.table import Column, Table, markdown
from weightsmith.study import flags as flagged
from weightsmith.study.bench import Result, Row
from weightsmith.study.orderings import Verdict

__all__ = ["document", "in_words", "markdown_page", "picture", "tables"]

COLOURS = {"base": "#9aa6b8", "expert": "#b9c3d1", "joint": "#7a8799", "merge": "#3b82c4"}
_PICTURED = 24  # bars in a picture, the best merges


def _decimals(result: Result) -> int:
    """Three digits that tell: 71.3, 2.104, 0.6312."""
    largest = max(abs(row.score) for row in result.rows)
    return 1 if largest >= 10 else 3 if largest >= 1 else 4


def ranked(result: Result) -> list[Row]:
    """The merges, best first."""
    merges = result.of("merge")
    if any(row.normalised is None for row in merges):
        return sorted(merges, key=lambda row: row.score, reverse=result.higher_is_better)
    return sorted(merges, key=lambda row: -(row.normalised or 0.0))


# --- tables ----------------------------------------------------------------------------------------


def main_table(result: Result) -> Table:
    """Every model: what it keeps, what it forgets, what it took."""
    decimals = _decimals(result)
    better = "higher" if result.higher_is_better else "lower"
    share = "model / expert" if result.higher_is_better else "expert / model"
    forgotten = f"on {', '.join(result.guards)}" if result.guards else "on the tasks, counting only losses"
    repeated = len(result.studies) > 1
    columns = [
        Column("name", "model"),
        Column("score", f"mean {result.score_name}", decimals, meaning="mean over the tasks"),
        Column("normalised", "of experts", 1, percent=True, meaning=f"{share}, mean over the tasks"),
        Column("defaults", "with defaults", 1, percent=True, meaning="the same, with what was searched left alone"),
        *([Column("spread", "±", 1, percent=True, meaning="its standard deviation over repetitions")] * repeated),
        Column("gain_kept", "gain kept", 0, percent=True, meaning="(model - base) / (expert - base), mean over tasks"),
        Column("forgetting", "forgetting", decimals, meaning=f"points lost against the base {forgotten}"),
        Column("seconds", "merge, s", 2, meaning="wall time of one merge"),
        Column("cpu_seconds", "CPU, s", 2, meaning="processor time of one merge, all threads"),
        Column("tuning_seconds", "tuning, s", 1, meaning="all merges and evaluations on validation data"),
        Column("megabytes", "peak, MB", 0, meaning="memory of the merge as planned"),
        Column("chosen", "chosen on validation"),
    ]
    rows = [*result.of("base", "expert", "joint"), *ranked(result)]
    notes = [
        f"Test split; {result.score_name}: {better} is better. Of experts: {share}, each task against its own expert. "
        f"Gain kept: (model - base) / (expert - base), mean over the tasks. Forgetting: points lost against the base "
        f"{forgotten}." + (f" Means over {len(result.studies)} repetitions." if repeated else "")
    ]
    notes += flagged.notes(result.rows)
    if result.without_gain:
        notes.append(f"No part of the gain kept, since the expert hardly gained: {', '.join(result.without_gain)}.")
    return Table(result.title, columns, [_record(row) for row in rows], notes, "kind", _best(rows))


def task_table(result: Result) -> Table:
    """Every model on every task and guard."""
    decimals = _decimals(result)
    columns = [
        Column("name", "model"),
        *(Column(f"task {task}", task, decimals) for task in result.tasks),
        *(Column(f"guard {guard}", f"({guard})", decimals, meaning="no task: what the base could do besides")
          for guard in result.guards),
    ]  # fmt: skip
    rows = [*result.of("base", "expert", "joint"), *ranked(result)]
    return Table(f"{result.title}: {result.score_name} by task", columns, [_record(row) for row in rows], (), "kind",
                 _best(rows))  # fmt: skip


def expert_table(result: Result) -> Table:
    """How far the experts went, and what they gained by it."""
    decimals = _decimals(result)
    base = result.rows[0].tasks
    rows = [
        {"task": task, "moved": row.moved, "base": base[task], "expert": row.tasks[task],
         "gain": row.tasks[task] - base[task]}
        for task, row in zip(result.tasks, result.of("expert"), strict=True)
    ]  # fmt: skip
    columns = (
        Column("task", "task"),
        Column("moved", "moved", 2, percent=True, meaning="|expert - base| / |base|"),
        Column("base", "base", decimals),
        Column("expert", "expert", decimals),
        Column("gain", "gain", decimals, signed=True),
    )
    return Table("What the experts gained, and how far they moved from the base", columns, rows)


def tried_table(result: Result) -> Table:
    """What was tried on validation data."""
    chosen = {row.name: row.chosen for row in result.rows}
    rows = [
        {"method": method, "choice": choice, "score": score, "taken": "chosen" if choice == chosen[method] else ""}
        for method, choices in result.tried.items()
        for choice, score in choices.items()
    ]
    columns = (
        Column("method", "method"),
        Column("choice", "coefficients"),
        Column("score", f"mean {result.score_name}", _decimals(result) + 1),
        Column("taken", ""),
    )
    strong = frozenset(at for at, row in enumerate(rows) if row["taken"])
    return Table("Coefficients tried on the validation split", columns, rows, (), "method", strong)


def order_table(result: Result) -> Table:
    """Published orders against what was measured, pair by pair."""
    rows = [
        {"source": verdict.source, "tau": verdict.tau, "pair": f"{pair.worse} < {pair.better}",
         "difference": pair.difference, "error": pair.error, "verdict": pair.verdict}
        for verdict in result.verdicts
        for pair in verdict.pairs
    ]  # fmt: skip
    columns = (
        Column("source", "published by"),
        Column("tau", "tau of the chain", 2, meaning="Kendall: 1 the paper's order, -1 its reverse, over all pairs"),
        Column("pair", "published"),
        Column("difference", "measured difference", 1, percent=True, signed=True, meaning="in normalised score"),
        Column("error", "± error", 1, percent=True, meaning="paired standard error over tasks and repetitions"),
        Column("verdict", "verdict"),
    )
    note = "Too close: within two standard errors of zero, paired over tasks and repetitions."
    return Table("Published orders and what was measured", columns, rows, (note,), "source")


def left_out_table(result: Result) -> Table:
    """What was not tried, and why."""
    rows = [{"method": method, "reason": reason} for method, reason in result.left_out.items()]
    return Table("Not tried", (Column("method", "method"), Column("reason", "why")), rows)


def tables(result: Result) -> list[Table]:
    """What a terminal shows, in order; tables without rows are left out."""
    found = [expert_table(result), main_table(result), task_table(result), order_table(result)]
    return [one for one in found if one.rows]


def _record(row: Row) -> dict[str, Any]:
    by_task = {f"task {task}": score for task, score in row.tasks.items()}
    guards = {f"guard {guard}": score for guard, score in row.guards.items()}
    megabytes = None if row.peak_bytes is None else row.peak_bytes / 1e6
    return {**vars(row), "name": flagged.marked(row), **by_task, **guards, "megabytes": megabytes}


def _best(rows: Sequence[Row]) -> frozenset[int]:
    return frozenset([at for at, row in enumerate(rows) if row.kind == "merge"][:1])


# --- words -----------------------------------------------------------------------------------------


def in_words(result: Result) -> list[str]:
    """What the figures say, a sentence each."""
    merges, warned = ranked(result), flagged.in_a_sentence(result.rows)
    if not merges:
        return [*warned, "no merge was made"]
    first, base = merges[0], result.rows[0]
    sign = 1 if result.higher_is_better else -1
    above = [row for row in merges if sign * (row.score - base.score) > 0]
    said = [*warned, f"best merge: {first.name}" + (f" ({first.chosen})" if first.chosen else "") + _share(first)]
    said.append(f"{len(above)} of {len(merges)} merges are better than the base on average")
    said += [_chain_in_words(verdict) for verdict in result.verdicts]
    least = base.normalised or 0.0
    if poor := [row.name for row in merges if row.defaults is not None and row.defaults < least]:
        said.append(f"below the base with their defaults: {', '.join(poor)}")
    if outer := [f"{row.name} ({', '.join(row.edges)})" for row in merges if row.edges]:
        said.append(f"chosen at the edge of what was tried, so a wider grid may find better: {', '.join(outer)}")
    said += [f"failed: {text}" for text in result.failed]
    return said


def _share(row: Row) -> str:
    share = "" if row.normalised is None else f", {100 * row.normalised:.1f}% of the experts' scores"
    return share if row.gain_kept is None else f"{share}, {100 * row.gain_kept:.0f}% of their gain"


def _chain_in_words(verdict: Verdict) -> str:
    broken = [f"{pair.worse} beats {pair.better}" for pair in verdict.pairs if pair.verdict == "broken"]
    close = sum(pair.verdict == "too close" for pair in verdict.pairs)
    kept = len(verdict.pairs) - len(broken) - close
    parts = [f"{kept} of {len(verdict.pairs)} steps kept"]
    parts += [f"{close} too close to tell"] if close else []
    parts += [f"broken: {', '.join(broken)}"] if broken else []
    sign = "−" if verdict.tau < 0 else ""
    tau = f"Kendall's tau {sign}{abs(verdict.tau):.2f}; 1: the same order, 0: unrelated, −1: reversed"
    return f"{verdict.source}: {'; '.join(parts)} ({tau})"


# --- plots -----------------------------------------------------------------------------------------


def score_figure(result: Result) -> Bars:
    """The normalised score of every merge."""
    compared = [row for row in [*result.of("base", "joint"), *ranked(result)] if row.normalised is not None]
    several = len(result.studies) > 1
    bars = [
        LabelledBar(
            row.name,
            share := 100 * (row.normalised or 0),
            f"{share:.1f}%",
            COLOURS[row.kind],
            100 * (row.spread or 0) if several else None,
            row.chosen or "no coefficient",
        )
        for row in compared
    ]
    note = f"Whiskers: standard deviation over {len(result.studies)} repetitions." if several else ""
    axis = "score as a share of the experts' own, mean over the tasks"
    return Bars(f"{result.title}: normalised score", bars, axis, note)


def task_figure(result: Result) -> Heat:
    """Every model on every task, coloured by the share of the expert's gain."""
    base = result.rows[0].tasks
    experts = {task: row.tasks[task] for task, row in zip(result.tasks, result.of("expert"), strict=True)}
    shown = [*result.of("base", "expert", "joint"), *ranked(result)]
    title = f"{result.title}: {result.score_name} by task"
    return heat_map(title, [(row.name, row.tasks) for row in shown], base, experts, decimals=_decimals(result))


def cost_figure(result: Result) -> Points:
    """What a merge takes against what it keeps."""
    merges = [row for row in ranked(result) if row.normalised is not None]
    points = [(row.name, max(row.cpu_seconds or 0, 1e-3), 100 * (row.normalised or 0)) for row in merges]
    return Points(
        f"{result.title}: cost and score", points, "processor seconds of one merge", "score, % of the experts"
    )


def document(results: Sequence[Result]) -> str:
    """One HTML page with everything; it needs no other file."""
    sections: list[Section] = []
    for result in results:
        sections.append(Text("In words" if len(results) == 1 else result.title, [result.about] * bool(result.about)))
        sections += [Text("", in_words(result)), score_figure(result), main_table(result), expert_table(result)]
        sections += [task_figure(result)]
        sections += [cost_figure(result)] if result.of("merge") else []
        sections += [one for one in (order_table(result), tried_table(result), left_out_table(result)) if one.rows]
    titles = dict.fromkeys(result.title for result in results)
    return page(f"{'; '.join(titles)}: what merging keeps", sections)


def markdown_page(results: Sequence[Result]) -> str:
    """The same as Markdown, without the plots."""
    parts = []
    for result in results:
        parts += [f"## {result.title}", *([result.about] if result.about else [])]
        parts.append("\n".join(f"- {line}" for line in in_words(result)))
        shown = [*tables(result), left_out_table(result)]
        parts += [f"**{one.title}**\n\n{markdown(one).rstrip()}" for one in shown if one.rows]
    return "\n\n".join(parts) + "\n"


def picture(results: Sequence[Result]) -> str:
    """Bars of the gain that each merge keeps, as an SVG."""
    panels = []
    for result in results:
        rows = [row for row in [*result.of("joint"), *ranked(result)[:_PICTURED]] if row.gain_kept is not None]
        drawn = [Bar(row.name, row.gain_kept or 0.0, other=row.kind == "joint") for row in rows]
        if drawn:
            panels.append(Panel(result.title, drawn))
    return (
        bars(panels, "Share of the experts' gain that one merged model keeps.", width=max(860, 560 * len(panels)))
        if panels
        else ""
    )
