"""`bench --suite`: a run's file in, tables and pages out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith import __version__
from weightsmith.core.errors import OutputError, PlanError, RecipeError
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.io.disk import write_file
from weightsmith.study.bench import Counter, alone
from weightsmith.study.cache import Ledger
from weightsmith.study.evaluate import digest
from weightsmith.study.evaluators.measure import HARNESSES
from weightsmith.study.suite import Suite
from weightsmith.study.suite_file import Bound, SuiteRun, bound_tasks, load_run
from weightsmith.study.suite_lab import Lab, peak_rss
from weightsmith.study.suite_methods import methods_of
from weightsmith.study.suite_table import TableResult, table

__all__ = ["bench_suite", "write_suite_pages"]

Say = Callable[[str], None]


def bench_suite(
    file: str | Path,
    out: str | Path,
    settings: Settings = DEFAULT,
    *,
    suite: str | None = None,
    methods: Sequence[str] = (),
    limit: int | None = None,
    allow_code_execution: bool = False,
    plugins: Sequence[str | Path] = (),
    say: Say | None = None,
    **options: Any,
) -> Any:
    """Run a suite on the models of a file; returns a TableResult, or a CellsResult of the designs with subsets.

    out      folder for scores.jsonl, which a repeated or interrupted run goes on from, recipes and pages
    suite    its name, where the file does not say so
    methods  labels of the methods to run;  limit: examples per task, which makes every figure indicative only
    allow_code_execution  let tasks of the evaluator `code` run what models write
    plugins  files of methods that were loaded: their text is part of what a score is kept under
    options  change single settings

    Raises RecipeError, PlanError or SourceError before anything is merged.
    """
    settings = settings.but(**options)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder for the scores and pages")
    run, chosen = load_run(file, suite)
    bound = bound_tasks(run, chosen)
    _allowed(run, bound, allow_code_execution)
    _used(run, chosen, bound)
    ledger = Ledger(folder / "scores.jsonl")
    setting = run.setting(str(settings.device), limit)
    counter = Counter(1, settings.progress)
    quiet = settings.but(progress=None)
    extra = [digest(Path(plugin)) for plugin in plugins]
    labs = {
        label: Lab.over(rung, f"{run.file}{f', {label}' if label else ''}", ledger, folder / "merged", quiet,
                        setting=setting, environments=run.environments, step=counter.step, extra=extra)
        for label, rung in run.bases.items()
    }  # fmt: skip
    told = say or (lambda text: None)
    with alone(folder):
        if chosen.design == "table":
            if len(labs) > 1:
                raise RecipeError(
                    f"{run.file}: {chosen.name} takes one base; several (`bases`) are for the scale study"
                )
            (lab,) = labs.values()
            counter.total = _evaluations(run, chosen, lab, bound, methods)
            told(f"{chosen.title}: {len(lab.experts)} experts, {len(bound)} tasks")
            return table(run, chosen, lab, bound, methods, folder, told)
        from weightsmith.study.suite_cells import cells

        return cells(run, chosen, labs, bound, methods, told, counter)


def _allowed(run: SuiteRun, bound: Mapping[str, Bound], allow: bool) -> None:
    """Refuse, before anything is done, what the user has not allowed or named."""
    faults = []
    for name, one in bound.items():
        if one.kind == "code" and not allow:
            faults.append(
                f"{run.file}: tasks.{name} runs programs that models write; allow it with --allow-code-execution"
            )
        if one.kind in HARNESSES and one.kind not in run.environments:
            faults.append(
                f"{run.file}: tasks.{name}: {one.kind} lives in an environment of its own; name its python: "
                f"environments: {{{one.kind}: ENV/bin/python}}"
            )
    for name in run.environments:
        if name not in HARNESSES:
            faults.append(f"{run.file}: environments.{name}: only {' and '.join(HARNESSES)} have one")
    if faults:
        raise PlanError(faults)


_ONLY: Mapping[str, tuple[str, ...]] = {
    "table": ("counts", "subsets"),
    "scale": ("homes", "checkpoints"),
    "wild": ("homes", "checkpoints", "tune", "budget"),
}
"""Design -> what it would leave unread."""


def _used(run: SuiteRun, chosen: Suite, bound: Mapping[str, Bound]) -> None:
    """RecipeError for what the suite's design would leave unread."""
    kind = {"table": "merges all experts", "scale": "merges subsets", "wild": "merges subsets, with one setting each"}
    faults = [f"{run.file}: {name}: {chosen.name} {kind[chosen.design]}; leave it out" for name in _ONLY[chosen.design]
              if name in run.model_fields_set]  # fmt: skip
    useless = {"table": (), "scale": ("guard",), "wild": ("proxy", "guard")}[chosen.design]
    faults += [f"{run.file}: tasks.{name}: {chosen.name} has no use for role: {one.task.role}; leave it out"
               for name, one in bound.items() if one.task.role in useless]  # fmt: skip
    if faults:
        raise RecipeError(*faults)


def _evaluations(run: SuiteRun, chosen: Any, lab: Lab, bound: Mapping[str, Bound], wanted: Sequence[str]) -> int:
    """How many tasks are scored, over all models."""
    proxies = sum(one.task.role == "proxy" for one in bound.values())
    tests = len(bound) - proxies
    tune = run.tune == "grid" and proxies > 0
    made, _ = methods_of(run, chosen, [lab], wanted, tune)
    trained = 1 + len(lab.experts) + bool(lab.rung.joint) + len(run.checkpoints)
    tried = sum(len(found) for found in made.values() if len(found) > 1)
    return int(tests * (trained + len(made)) + proxies * (tried + len(lab.experts) * tune))


def write_suite_pages(result: Any, folder: Path) -> list[Path]:
    """Write results.json (the same for every run of the same), costs.json, results.md, results.csv, results.html."""
    if isinstance(result, TableResult):
        from weightsmith.study import suite_show as show
    else:
        from weightsmith.study import cells_show as show  # type: ignore[no-redef]
    costs = {name: vars(cost) for name, cost in result.costs.items()}
    texts = {
        "results.json": json.dumps({"weightsmith": __version__, "result": result.plain()}, indent=1) + "\n",
        "costs.json": json.dumps({"rows": costs, "peak_rss": peak_rss(), "peak_device": _device_peak()}, indent=1)
        + "\n",
        "results.md": show.markdown_page(result),
        "results.csv": show.csv_text(result),
        "results.html": show.document(result),
    }
    return [write_file(folder / name, text) for name, text in texts.items()]


def _device_peak() -> int:
    """Bytes of the GPU that were held at most; 0 without one."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
