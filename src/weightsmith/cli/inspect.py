"""`weightsmith inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, Json, Plugins, Quiet, RecipeFile, Sets, Threads, chosen, read_recipe
from weightsmith.cli.show import progress_bar, say, show_json
from weightsmith.cli.shown.inspection import check_page, show
from weightsmith.cli.words import Parameter

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
        check_page(html)
    read = read_recipe(recipe, set_, plugin)

    from weightsmith.inspect.run import inspect as measure
    from weightsmith.inspect.show import html_page, plain
    from weightsmith.io.disk import write_file

    with progress_bar("inspecting", quiet=quiet or json, nbytes=False) as progress:
        found = measure(read, chosen(threads=threads, device=device, progress=progress), spectra=spectra)
    if json:
        show_json(plain(found))
    elif not quiet:
        show(found)
    if html is not None:
        write_file(html, html_page(found, f"Task vectors of {', '.join(found.experts)}"))
        if not json and not quiet:
            say(f"\nwrote {html}")
