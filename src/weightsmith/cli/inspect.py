"""`weightsmith inspect`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from weightsmith.cli.options import Device, Json, Plugins, Quiet, RecipeFile, Sets, Threads, chosen, read_recipe
from weightsmith.cli.show import progress_bar, say, show_json, table
from weightsmith.cli.words import Parameter

if TYPE_CHECKING:
    from weightsmith.inspect.run import Inspection

__all__ = ["inspect"]


def inspect(
    recipe: RecipeFile,
    /,
    *,
    html: Annotated[Path | None, Parameter(help="Write a page with heat maps to this file.")] = None,
    spectra: Annotated[
        int, Parameter(help="Largest smaller side of a matrix to take spectra of; 0: none.", show_default=True)
    ] = 1024,
    set_: Sets = (),
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    plugin: Plugins = (),
) -> None:
    """Measure how the models' task vectors lie to each other, and say which methods that speaks for."""
    from weightsmith.core.errors import RecipeError

    if spectra < 0:
        raise RecipeError(f"--spectra {spectra} is outside [0, inf); 0 takes no spectra")
    if html is not None:
        _check_page(html)
    read = read_recipe(recipe, set_, plugin)

    from weightsmith.inspect.run import inspect as measure
    from weightsmith.inspect.show import html_page, plain
    from weightsmith.io.disk import write_file

    with progress_bar("inspecting", quiet=quiet or json, nbytes=False) as progress:
        found = measure(read, chosen(threads=threads, device=device, progress=progress), spectra=spectra)
    if json:
        show_json(plain(found))
    elif not quiet:
        _show(found)
    if html is not None:
        write_file(html, html_page(found, f"Task vectors of {', '.join(found.experts)}"))
        if not json and not quiet:
            say(f"\nwrote {html}")


def _check_page(path: Path) -> None:
    """What stands in the way of writing the page is better known before the measuring than after it."""
    from weightsmith.core.errors import MissingExtra, OutputError

    if importlib.util.find_spec("plotly") is None:
        raise MissingExtra("plotly", "report", "--html")
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"--html {path}: not a file in an existing folder; make the folder {path.parent} or name one")


def _show(found: Inspection) -> None:
    from weightsmith.inspect.show import advice_lines, summary, tables

    for one in tables(found):
        right = [i for i, number in enumerate(one.numeric()) if number]
        table(one.title, [column.title for column in one.columns], one.cells(), right)
    for line in summary(found):
        say(line)
    say("\nWhat the figures speak for:")
    for line in advice_lines(found) or ["no rule holds"]:
        say(f"  - {line}")
