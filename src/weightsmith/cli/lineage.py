"""`weightsmith lineage`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Json
from weightsmith.cli.show import say, show_json
from weightsmith.cli.words import Parameter

__all__ = ["lineage"]


def lineage(
    out: Annotated[Path, Parameter(help="Folder that weightsmith has written; or that of a sweep.")],
    /,
    *,
    json: Json = False,
) -> None:
    """Show what a model was made from, and that from what, as far as the folders are still there."""
    from weightsmith.inspect.ancestry import ancestry as behind
    from weightsmith.inspect.ancestry import tree_lines
    from weightsmith.jobs.sweep import variants_in

    variants = variants_in(out)
    found = {name: behind(place) for name, place in (variants or {"": out}).items()}
    if json:
        show_json(found if variants else found[""])
    else:
        for tree in found.values():
            for line in tree_lines(tree):
                say(line)
