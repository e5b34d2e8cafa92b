"""`weightsmith bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, Json, Memory, Plugins, Quiet, Threads
from weightsmith.cli.words import Parameter

__all__ = ["bench"]

_SCORES = "Python file that defines scores(model, split); it is run."
_OUT = "Folder for scores and pages; default: bench beside the study."
_SUITE = "Run a suite (see --list) on the models of one file; without a file: say what the suite is."
_LIMIT = "Examples per task of a suite; figures are then indicative only."
_CODE = "Let a suite's tasks run programs that models write."


def bench(
    *studies: Annotated[Path, Parameter(help="Study files, or folders with a study.yaml; of one title: repetitions.")],
    out: Annotated[Path | None, Parameter(name=["--out", "-o"], help=_OUT)] = None,
    evaluator: Annotated[Path | None, Parameter(help=_SCORES)] = None,
    methods: Annotated[str | None, Parameter(help="Labels of methods, separated by commas; default: all.")] = None,
    suite: Annotated[str | None, Parameter(help=_SUITE)] = None,
    list: Annotated[bool, Parameter(help="List the suites.")] = False,
    limit: Annotated[int | None, Parameter(help=_LIMIT)] = None,
    allow_code_execution: Annotated[bool, Parameter(help=_CODE)] = False,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    plugin: Plugins = (),
) -> None:
    """Compare methods on models of your own: merge, choose coefficients on validation data, score on test data."""
    from weightsmith.cli.shown.study import run_studies
    from weightsmith.cli.shown.suite import is_suite, list_suites, run_suite
    from weightsmith.plugins import load_file

    if list or (suite is not None and not studies):
        list_suites(suite, json)
        return
    for file in plugin:
        load_file(file)
    settings = {"memory": memory, "threads": threads, "device": device}
    asked = [name.strip() for name in (methods or "").split(",") if name.strip()]
    if is_suite(studies, suite, limit, allow_code_execution, evaluator):
        more = {"suite": suite, "limit": limit, "allow_code_execution": allow_code_execution, "plugins": plugin}
        run_suite(studies[0], out, settings, json=json, quiet=quiet, methods=asked, **more)
    else:
        run_studies(studies, out, settings, json, quiet, evaluator=evaluator, methods=asked, plugins=plugin)
