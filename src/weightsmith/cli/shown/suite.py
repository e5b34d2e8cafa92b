"""Suites: the list of them, and one run of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.cli.show import progress_bar, say, show_json
from weightsmith.cli.shown.tables import show_tables

__all__ = ["is_suite", "list_suites", "run_suite"]


def is_suite(files: Sequence[Path], name: str | None, limit: int | None, code: bool, evaluator: Path | None) -> bool:
    """Whether a suite is meant: by its option, or by the key `suite` of the one file.

    Raises RecipeError for what does not go together.
    """
    from weightsmith.core.errors import RecipeError
    from weightsmith.recipe.files import text_of
    from weightsmith.recipe.reader import read_all

    if not files:
        raise RecipeError("no study; name at least one file, or a folder with a study.yaml; bench --list: the suites")
    named = name is not None
    if not named and len(files) == 1 and files[0].expanduser().is_file():
        tree = read_all(text_of(files[0].expanduser()), str(files[0]))[0].tree
        named = isinstance(tree, Mapping) and "suite" in tree
    if named and len(files) > 1:
        raise RecipeError(f"a suite takes one file, got {len(files)}")
    if named and evaluator is not None:
        raise RecipeError(
            "--evaluator is for studies; a suite's tasks name their evaluators, a program of yours among them"
        )
    if not named and (limit is not None or code):
        raise RecipeError("--limit and --allow-code-execution are for suites; name one with --suite")
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit must be at least 1 (got {limit})")
    return named


def list_suites(name: str | None, json: bool) -> None:
    """All suites in a line each, or one with its tasks and its rule."""
    from weightsmith.study.suite_show import described
    from weightsmith.study.suites import suite, suites

    found = [suite(name)] if name is not None else [*suites().values()]
    if json:
        show_json([described(one) for one in found])
        return
    if name is None:
        from weightsmith.report.table import Column, Table

        rows = [{"name": one.name, "title": one.title, "source": one.source.split(";")[0]} for one in found]
        columns = (Column("name", "suite"), Column("title", "title"), Column("source", "source"))
        show_tables([Table("Suites", columns, rows)])
        return
    (one,) = found
    for line in (f"{one.title} ({one.name})", one.source, one.about, f"Rule: {one.rule.words}"):
        say(line)
    for task in one.tasks:
        mark = {"higher": "", "lower": ", lower is better", "per unit": ", lower is better"}[task.direction]
        say(
            f"  {task.domain}: {task.name} [{task.role}], {task.metric}{mark}"
            + (f", {task.harness}" * bool(task.harness))
        )
    for what, names in (("Experts", one.experts), ("Checkpoints beside the merges", one.checkpoints),
                        ("Methods", one.methods or {})):  # fmt: skip
        if names:
            say(f"{what}: {', '.join(names)}")
    for line in one.notes:
        say(f"- {line}")


def run_suite(
    file: Path, out: Path | None, settings: Mapping[str, Any], *, json: bool, quiet: bool, **more: Any
) -> None:
    """Run, write the pages, show the tables."""
    from weightsmith.cli.options import chosen
    from weightsmith.study.suite_bench import bench_suite, write_suite_pages
    from weightsmith.study.suite_table import TableResult

    folder = out if out is not None else file.expanduser().parent / "bench"
    silent = quiet or json
    with progress_bar("benching", quiet=silent, nbytes=False) as progress:
        told = None if silent else say
        result = bench_suite(file, folder, chosen(**settings, progress=progress), say=told, **more)
    pages = write_suite_pages(result, folder)
    if json:
        show_json(result.plain())
    elif not quiet:
        if isinstance(result, TableResult):
            from weightsmith.study import suite_show as show
        else:
            from weightsmith.study import cells_show as show  # type: ignore[no-redef]
        say()
        show_tables(show.tables(result))
        for line in show.in_words(result):
            say(f"- {line}")
        say("wrote " + ", ".join(map(str, pages)))
