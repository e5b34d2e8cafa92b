"""`weightsmith bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, Json, Memory, Plugins, Quiet, Threads, chosen
from weightsmith.cli.show import progress_bar, say, show_json
from weightsmith.cli.shown.study import show
from weightsmith.cli.words import Parameter

__all__ = ["bench"]

_SCORES = "Python file that defines scores(model, split); it is run."
_OUT = "Folder for scores and pages; default: bench beside the study."


def bench(
    *studies: Annotated[Path, Parameter(help="Study files, or folders with a study.yaml; of one title: repetitions.")],
    out: Annotated[Path | None, Parameter(name=["--out", "-o"], help=_OUT)] = None,
    evaluator: Annotated[Path | None, Parameter(help=_SCORES)] = None,
    methods: Annotated[str | None, Parameter(help="Labels of methods, separated by commas; default: all.")] = None,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    plugin: Plugins = (),
) -> None:
    """Compare methods on models of your own: merge, choose coefficients on validation data, score on test data."""
    from weightsmith.core.errors import RecipeError
    from weightsmith.plugins import load_file
    from weightsmith.study.schema import load_study

    if not studies:
        raise RecipeError("no study; name at least one file, or a folder with a study.yaml")
    for file in plugin:
        load_file(file)
    read = [load_study(path) for path in studies]
    folder = out if out is not None else read[0].file.parent / "bench"

    from weightsmith.study.bench import bench as measure
    from weightsmith.study.bench import plain
    from weightsmith.study.pages import write_pages

    silent = quiet or json
    with progress_bar("benching", quiet=silent, nbytes=False) as progress:
        settings = chosen(memory=memory, threads=threads, device=device, progress=progress)
        wanted = [name.strip() for name in (methods or "").split(",") if name.strip()]
        told = None if silent else say
        results = measure(read, folder, settings, evaluator=evaluator, methods=wanted, plugins=plugin, say=told)
    pages = write_pages(results, folder)
    if json:
        show_json(plain(results))
    elif not quiet:
        show(results)
        say("wrote " + ", ".join(map(str, pages)))
