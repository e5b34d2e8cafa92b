"""`weightsmith schema`."""

from __future__ import annotations

from weightsmith.cli.options import Plugins
from weightsmith.cli.show import show_json

__all__ = ["schema"]


def schema(*, plugin: Plugins = ()) -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML.

    In the first line of a recipe: # yaml-language-server: $schema=recipe.schema.json
    """
    from weightsmith.plugins import load_file
    from weightsmith.recipe.json_schema import schema as recipe_schema

    for file in plugin:
        load_file(file)
    show_json(recipe_schema())
