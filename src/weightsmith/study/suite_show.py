"""A suite's table, in words, as Markdown, CSV and one HTML page with a picker of compromises."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.report.figures import Bars, LabelledBar
from weightsmith.report.html import Section, Text, page
from weightsmith.report.pareto import Panel, Picker
from weightsmith.report.table import Column, Table, markdown
from weightsmith.study import flags as flagged
from weightsmith.study.suite_lab import Cost
from weightsmith.study.suite_table import SuiteRow, TableResult

__all__ = ["csv_text", "described", "document", "in_words", "markdown_page", "tables"]

_COLOURS = {"base": "#9aa6b8", "expert": "#b9c3d1", "joint": "#7a8799", "checkpoint": "#7a8799", "merge": "#3b82c4"}


def ranked(result: TableResult) -> list[SuiteRow]:
    """Base, experts, joint model and checkpoints as they come, then the merges, best first."""
    merges = [row for row in result.rows if row.kind == "merge"]
    merges.sort(key=lambda row: -(row.figures.figure if row.figures.figure is not None else row.figures.mean))
    return [*(row for row in result.rows if row.kind != "merge"), *merges]


def _record(row: SuiteRow, cost: Cost) -> dict[str, Any]:
    figures = row.figures
    sum_versus = row.versus.get("base")
    return {
        "name": flagged.marked(row, " =" if row.tied else ""),
        "kind": row.kind,
        "figure": figures.figure,
        "mean": figures.mean,
        "least": None if figures.worst is None else figures.normalised[figures.worst],
        "worst": figures.worst,
        "gain": sum(figures.gain.values()) / len(figures.gain) if figures.gain else None,
        "forgetting": figures.forgetting,
        "retention": figures.retention,
        "regret_expert": row.regret_expert,
        "regret_sum": row.regret_sum,
        "joint": row.joint,
        "low": None if sum_versus is None else sum_versus[1],
        "high": None if sum_versus is None else sum_versus[2],
        "merge": cost.merge_seconds or None,
        "tune": cost.tune_seconds or None,
        "evaluate": cost.evaluate_seconds or None,
        "peak": cost.peak_bytes / 1e6 if cost.peak_bytes else None,
        "read": cost.read_bytes / 1e6 if cost.read_bytes else None,
        "written": cost.write_bytes / 1e6 if cost.write_bytes else None,
        "tried": cost.candidates or None,
        "chosen": row.chosen,
        **{f"domain {name}": value for name, value in figures.domains.items()},
        **{f"share {name}": value for name, value in figures.normalised.items()},
        **{f"gain {name}": value for name, value in figures.gain.items()},
        **{f"task {name}": value for name, value in row.scores.items()},
        **{f"error {name}": value for name, value in row.errors.items()},
        **{f"more {task} {name}": value for task, found in row.metrics.items() for name, value in found.items()},
    }


def _records(result: TableResult) -> list[dict[str, Any]]:
    return [_record(row, result.costs.get(row.name, Cost())) for row in ranked(result)]


def _strong(rows: Sequence[SuiteRow]) -> frozenset[int]:
    return frozenset([at for at, row in enumerate(rows) if row.kind == "merge"][:1])


def main_table(result: TableResult) -> Table:
    """Raw per domain, and the figures."""
    domains = list(result.rows[0].figures.domains)
    guards = result.rows[0].figures.forgetting is not None
    joint = any(row.joint is not None for row in result.rows)
    columns = [
        Column("name", "model"),
        *(Column(f"domain {d}", d, 3, meaning="mean of its tasks, higher is better") for d in domains),
        Column("figure", "normalised", 3, meaning=result.rule),
        Column("gain", "gain kept", 3, meaning="(model - base) / (reference - base), mean over domains that gained"),
        Column("least", "worst", 3, meaning="the least normalised domain"),
        Column("worst", "worst in"),
        *(
            [Column("forgetting", "forgetting", 3, signed=True, meaning="score - base's, mean over the guards")]
            * guards
        ),
        *([Column("retention", "retention", 3, meaning="score / base's, mean over the guards")] * guards),
        Column("regret_expert", "regret to expert", 3, signed=True, meaning="the best expert's mean - this mean"),
        Column("regret_sum", "regret to TA", 3, signed=True, meaning="task arithmetic's mean - this mean"),
        *([Column("joint", "over joint", 3, signed=True, meaning="this mean - the joint model's")] * joint),
        Column("low", "over base, low", 3, signed=True, meaning="of the normalised score, paired bootstrap, 2.5%"),
        Column("high", "high", 3, signed=True, meaning="97.5%"),
        Column("chosen", "chosen on proxies"),
    ]
    notes = [
        result.rule,
        "=: cannot be told from the best merge (paired bootstrap over examples, 10,000 draws, seed 0; what models are "
        "divided by is held fixed).",
    ]
    notes += [*flagged.notes(result.rows), *result.warnings]
    return Table(result.title, columns, _records(result), notes, "kind", _strong(ranked(result)))


def task_table(result: TableResult) -> Table:
    """Every task as its evaluator gave it."""
    tasks = [task for task in result.tasks if task["role"] != "proxy"]
    marks = {"higher": "", "lower": " ↓", "per unit": " ↓"}
    columns = [Column("name", "model")]
    for task in tasks:
        said = f"{task['metric']} by {task['evaluator']}; {task['domain']}, {task['role']}"
        columns.append(Column(f"task {task['name']}", task["name"] + marks[task["direction"]], 3, meaning=said))
        columns.append(Column(f"error {task['name']}", "±", 3, meaning="standard error"))
    records = _records(result)
    shown = [c for c in columns if not c.key.startswith("error ") or any(c.key in r for r in records)]
    return Table(f"{result.title}: tasks", shown, records, ["↓: lower is better."], "kind", _strong(ranked(result)))


def more_table(result: TableResult) -> Table:
    """What the evaluators gave besides the scores."""
    records = _records(result)
    keys = list(dict.fromkeys(key for record in records for key in record if key.startswith("more ")))
    columns = [Column("name", "model"), *(Column(key, key.removeprefix("more "), 3) for key in keys)]
    rows = records if keys else []
    return Table(f"{result.title}: beside the scores", columns, rows, (), "kind", _strong(ranked(result)))


def share_table(result: TableResult) -> Table:
    """Normalised and gain-normalised by domain."""
    domains = list(result.rows[0].figures.domains)
    columns = [
        Column("name", "model"),
        *(Column(f"share {d}", d, 3, meaning="share of what the rule divides by") for d in domains),
        *(Column(f"gain {d}", f"{d}, gain", 3, meaning="(model - base) / (reference - base)") for d in domains),
    ]
    return Table(
        f"{result.title}: normalised by domain", columns, _records(result), (), "kind", _strong(ranked(result))
    )


def cost_table(result: TableResult) -> Table:
    """Where the time went."""
    columns = (
        Column("name", "model"),
        Column("merge", "merge, s", 2),
        Column("tune", "tune, s", 1, meaning="merges and evaluations of all candidates on the proxies"),
        Column("evaluate", "evaluate, s", 1),
        Column("tried", "candidates", 0),
        Column("peak", "peak, MB", 0, meaning="memory of the merge, as planned"),
        Column("read", "read, MB", 1),
        Column("written", "written, MB", 1),
    )
    return Table(f"{result.title}: costs", columns, _records(result), (), "kind")


def tried_table(result: TableResult) -> Table:
    """The grid, and the pick."""
    chosen = {row.name: row.chosen for row in result.rows}
    rows = [
        {"method": method, "choice": choice, "score": score,
         "taken": "chosen" if choice == (chosen.get(method) or "the paper's settings") else ""}
        for method, choices in result.tried.items()
        for choice, score in choices.items()
    ]  # fmt: skip
    columns = (
        Column("method", "method"),
        Column("choice", "settings"),
        Column("score", "on proxies", 4),
        Column("taken", ""),
    )
    strong = frozenset(at for at, row in enumerate(rows) if row["taken"])
    note = "Mean over the proxies' domains, each as a share of the best expert's."
    return Table(f"{result.title}: chosen on proxies", columns, rows, (note,), "method", strong)


def left_out_table(result: TableResult) -> Table:
    rows = [{"method": method, "reason": reason} for method, reason in result.left_out.items()]
    rows += [{"method": line.partition(":")[0], "reason": line.partition(": ")[2]} for line in result.failed]
    return Table("Not merged", (Column("method", "method"), Column("reason", "why")), rows)


def tables(result: TableResult) -> list[Table]:
    """What a terminal shows, in order."""
    found = [main_table(result), task_table(result), cost_table(result), left_out_table(result)]
    return [one for one in found if one.rows]


def in_words(result: TableResult) -> list[str]:
    """What the figures say, a sentence each."""
    merges = [row for row in ranked(result) if row.kind == "merge"]
    said = list(result.warnings)
    said += flagged.in_a_sentence(result.rows)
    if not merges:
        return [*said, "no merge was made"]
    first = merges[0]
    tied = [row.name for row in merges if row.tied]
    share = "" if first.figures.figure is None else f", normalised {first.figures.figure:.3f}"
    said.append(f"best merge: {first.name}{f' ({first.chosen})' if first.chosen else ''}{share}")
    if tied:
        said.append(f"not to be told from it: {', '.join(tied)}")
    if any(row.versus for row in merges):
        others = [name for name in merges[0].versus if name == "base" or name.startswith("expert ")]
        above = {name: sum(row.versus[name][1] > 0 for row in merges) for name in others}
        counted = [
            f"{count} of {len(merges)} above {'the base' if name == 'base' else name}" for name, count in above.items()
        ]
        said.append(f"merges beyond chance: {', '.join(counted)}")
    still = {task: found["do_nothing"] for task, found in result.rows[0].metrics.items() if "do_nothing" in found}
    said += [f"{task}: giving back what is to be edited scores {value:.3f}" for task, value in still.items()]
    truncated = {task: notes for row in result.rows for task, notes in row.notes.items()}
    said += [f"{task}: {', '.join(f'{count:g} {what}' for what, count in notes.items())} of at least one model"
             for task, notes in truncated.items()]  # fmt: skip
    return said


# --- files -------------------------------------------------------------------------------------------


def markdown_page(result: TableResult) -> str:
    """Everything but the plots."""
    shown = [*tables(result), share_table(result), more_table(result), tried_table(result)]
    parts = [f"## {result.title}", f"Source: {result.source}", "\n".join(f"- {line}" for line in in_words(result))]
    parts += [f"**{one.title}**\n\n{markdown(one).rstrip()}" for one in shown if one.rows]
    return "\n\n".join(parts) + "\n"


def csv_text(result: TableResult) -> str:
    """A line per model and figure's column, for spreadsheets and plots."""
    records = [
        {**record, "name": row.name, "tied": row.tied, "flags": "; ".join(row.flags)}
        for record, row in zip(_records(result), ranked(result), strict=True)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def document(result: TableResult) -> str:
    """One HTML page; it needs no other file."""
    sections: list[Section] = [Text("In words", [result.source, *in_words(result)])]
    sections += [one for one in (_bars(result),) if one.bars]
    sections.append(_picker(result))
    shown = (main_table, share_table, task_table, more_table, cost_table, tried_table, left_out_table)
    sections += [one for table in shown if (one := table(result)).rows]
    return page(result.title, sections)


def _bars(result: TableResult) -> Bars:
    bars = [
        LabelledBar(row.name, row.figures.figure, f"{row.figures.figure:.3f}", _COLOURS[row.kind], None, row.chosen)
        for row in ranked(result)
        if row.figures.figure is not None and row.kind != "expert"
    ]
    return Bars("Normalised score", bars, "share of what the rule divides by")


def _picker(result: TableResult) -> Picker:
    """Cost against score, and every two domains against each other."""
    rows = [row for row in ranked(result) if row.kind in ("merge", "joint", "checkpoint", "base")]
    merges = [row for row in rows if row.kind == "merge"]
    panels = []
    priced = [
        (row, cost)
        for row in merges
        if (cost := result.costs.get(row.name)) is not None and row.figures.figure is not None
    ]
    points = [
        (row.name, max(cost.merge_seconds + cost.tune_seconds, 1e-3), float(row.figures.figure or 0))
        for row, cost in priced
    ]
    panels.append(
        Panel("cost and score", "merge and tuning, s", "normalised score", points, less_across=True, powers=True)
    )
    domains = list(result.rows[0].figures.domains)
    for at, one in enumerate(domains):
        for other in domains[at + 1 :]:
            points = [(row.name, row.figures.domains[one], row.figures.domains[other]) for row in rows]
            panels.append(Panel(f"{one} and {other}", one, other, points))
    note = (
        "Filled points are not dominated: nothing is better in one and no worse in the other. Choose what to compare."
    )
    return Picker("Compromises", panels, note)


def described(suite: Any) -> Mapping[str, Any]:
    """A suite as plain values, for `--list --json`."""
    return {
        "name": suite.name, "title": suite.title, "source": suite.source, "about": suite.about,
        "rule": suite.rule.words, "design": suite.design, "domains": list(suite.domains),
        "tasks": [{"name": t.name, "domain": t.domain, "role": t.role, "metric": t.metric, "direction": t.direction,
                   "harness": t.harness, "split": t.split} for t in suite.tasks],
        "experts": list(suite.experts), "checkpoints": list(suite.checkpoints),
        "methods": {label: method.note for label, method in (suite.methods or {}).items()},
        "notes": list(suite.notes),
    }  # fmt: skip
