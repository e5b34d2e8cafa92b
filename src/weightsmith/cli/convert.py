"""`weightsmith convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Plugins, Sets, read_recipe
from weightsmith.cli.words import Parameter

__all__ = ["convert"]


def convert(
    config: Annotated[Path, Parameter(help="mergekit config, YAML; or a recipe, to see it in its shortest form.")],
    /,
    *,
    set_: Sets = (),
    plugin: Plugins = (),
) -> None:
    """Print a mergekit config as the recipe that does the same; paths become absolute."""
    import sys

    from weightsmith.recipe.text import dumps

    sys.stdout.write(dumps(read_recipe(config, set_, plugin)))
