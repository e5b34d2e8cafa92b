"""`weightsmith search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import DEFAULTS, Json, Plugins, Quiet, Run, Sets
from weightsmith.cli.show import progress_bar, say
from weightsmith.cli.words import Parameter

__all__ = ["search"]

_WHAT = "What to search, YAML or JSON (SEARCH.yaml); or the word pick."
_OUT = "Folder of the results; with pick: of a finished search."
_PREFER = "pick: what counts how much, as math=2,code=1."


def search(
    what: Annotated[Path, Parameter(help=_WHAT)],
    out: Annotated[Path, Parameter(help=_OUT)],
    /,
    *,
    prefer: Annotated[str | None, Parameter(help=_PREFER)] = None,
    to: Annotated[Path | None, Parameter(help="pick: where to put the recipe.")] = None,
    set_: Sets = (),
    dry_run: Annotated[bool, Parameter(help="Say what would be done, and stop.")] = False,
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
    plugin: Plugins = (),
) -> None:
    """Find values of a recipe by scoring candidates; OUT/recipe.yaml is the best, OUT/report.html says how good.

    The same command goes on where an interrupted one stopped; --overwrite begins anew.
    "search pick OUT --prefer math=2,code=1" chooses a point of a front.
    """
    from weightsmith.cli.shown.searching import picked, planned, show
    from weightsmith.plugins import load_file

    if str(what) == "pick":
        picked(out, prefer, to, json=json)
        return
    for file in plugin:
        load_file(file)
    from weightsmith.search.api import carry_out, load, prepared

    silent = quiet or json
    with progress_bar("searching", quiet=silent, nbytes=False) as progress:
        settings = settings.but(progress=progress)
        work = prepared(load(what, set_), out, settings)
        planned(work, json=json and dry_run, quiet=silent)
        made = None if dry_run else carry_out(work, settings, (lambda text: None) if silent else say)
    show(made, json=json, quiet=quiet)
