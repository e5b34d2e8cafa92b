"""`weightsmith schema`."""

from __future__ import annotations

from typing import Annotated, Literal

from weightsmith.cli.options import Plugins
from weightsmith.cli.show import show_json
from weightsmith.cli.words import Parameter

__all__ = ["schema"]


def schema(
    of: Annotated[Literal["recipe", "tune"], Parameter(help="Recipes, or files for weightsmith tune.")] = "recipe",
    /,
    *,
    plugin: Plugins = (),
) -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML.

    In the first line of a recipe: # yaml-language-server: $schema=recipe.schema.json
    """
    from weightsmith.plugins import load_file

    for file in plugin:
        load_file(file)
    if of == "tune":
        from weightsmith.tune.json_schema import schema as made
    else:
        from weightsmith.recipe.json_schema import schema as made
    show_json(made())
