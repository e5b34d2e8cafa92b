"""`weightsmith bench`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from weightsmith.cli.options import Device, Json, Memory, Plugins, Quiet, Threads, chosen
from weightsmith.cli.show import progress_bar, say, show_json, table
from weightsmith.cli.words import Parameter

if TYPE_CHECKING:
    from weightsmith.study.bench import Result

__all__ = ["bench"]


def bench(
    *studies: Annotated[Path, Parameter(help="Study files, or folders with a study.yaml; of one title: repetitions.")],
    out: Annotated[
        Path | None,
        Parameter(name=["--out", "-o"], help="Folder for scores and pages; default: bench beside the study."),
    ] = None,
    evaluator: Annotated[
        Path | None, Parameter(help="Python file that defines scores(model, split); it is run.")
    ] = None,
    methods: Annotated[str | None, Parameter(help="Labels of methods, separated by commas; default: all.")] = None,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    plugin: Plugins = (),
) -> None:
    """Compare methods on models of your own: merge, choose coefficients on validation data, score on test data."""
    from weightsmith.core.errors import MissingExtra, RecipeError
    from weightsmith.plugins import load_file
    from weightsmith.study.schema import load_study

    if not studies:
        raise RecipeError("no study; name at least one file, or a folder with a study.yaml")
    if importlib.util.find_spec("plotly") is None:
        raise MissingExtra("plotly", "report", "the page of weightsmith bench")
    for file in plugin:
        load_file(file)
    read = [load_study(path) for path in studies]
    folder = out if out is not None else read[0].file.parent / "bench"

    from weightsmith.study.bench import bench as measure
    from weightsmith.study.pages import write_pages

    silent = quiet or json
    with progress_bar("benching", quiet=silent, nbytes=False) as progress:
        results = measure(
            read,
            folder,
            chosen(memory=memory, threads=threads, device=device, progress=progress),
            evaluator=evaluator,
            methods=[name.strip() for name in (methods or "").split(",") if name.strip()],
            plugins=plugin,
            say=None if silent else say,
        )
    pages = write_pages(results, folder)
    if json:
        from weightsmith.study.bench import plain

        show_json(plain(results))
    elif not quiet:
        _show(results)
        say("wrote " + ", ".join(map(str, pages)))


def _show(results: tuple[Result, ...]) -> None:
    from weightsmith.study.show import in_words, tables

    for result in results:
        say()
        for one in tables(result):
            right = [i for i, number in enumerate(one.numeric()) if number]
            table(one.title, [column.title for column in one.columns], one.cells(), right)
        for line in in_words(result):
            say(f"- {line}")
        say()
