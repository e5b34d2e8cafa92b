"""Options that several verbs share, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from weightsmith.cli.words import Parameter
from weightsmith.core.settings import DEFAULT, Settings

if TYPE_CHECKING:
    from weightsmith.recipe.schema import Recipe

__all__ = [
    "DEFAULTS",
    "Device",
    "GoOn",
    "Json",
    "Memory",
    "Out",
    "Overwrite",
    "Plugins",
    "Quiet",
    "RecipeFile",
    "Run",
    "Sets",
    "Sweeps",
    "Threads",
    "chosen",
    "read_recipe",
    "read_variants",
]

RecipeFile = Annotated[Path, Parameter(help="Recipe file, YAML or JSON.")]
Out = Annotated[Path, Parameter(help="Folder to write; it appears when it is complete.")]
Sets = Annotated[
    tuple[str, ...],
    Parameter(name="--set", help="Change one value of the recipe, as parameters.density=0.3; may be repeated."),
]
Sweeps = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        help="Change one value of the recipe, as parameters.density=0.3; may be repeated.  "
        "Several values (0.1,0.2,0.4) make a folder each inside OUT, in one pass over the inputs.",
    ),
]
Plugins = Annotated[
    tuple[Path, ...], Parameter(name="--plugin", help="Python file that defines further methods; it is run.")
]
Json = Annotated[bool, Parameter(help="Print JSON for programs, and nothing else.")]
Quiet = Annotated[bool, Parameter(help="Print nothing but errors and warnings.")]


_KINDS: Mapping[str, Any] = {
    "memory": str | None,  # as 4GB; the settings make a number of it
    "threads": int | None,
    "device": str,
    "ray": str | None,
    "resume": bool,
    "overwrite": bool,
    "fingerprint": Literal["quick", "full"],
}
"""The settings that are options, and what is written for them."""


def _meanings() -> dict[str, str]:
    """Field -> its line in the docstring of `Settings`."""
    lines = re.findall(r"^ {4}(\w+) {2,}(.+)$", Settings.__doc__ or "", re.MULTILINE)
    return dict(lines)


def _option(name: str) -> Parameter:
    default = getattr(DEFAULT, name)
    return Parameter(help=_meanings()[name], show_default=isinstance(default, str))


def _options() -> type[Settings]:
    """`Settings` as cyclopts reads them."""
    own = [(name, Annotated[kind, _option(name)], field(default=getattr(DEFAULT, name)))
           for name, kind in _KINDS.items()]  # fmt: skip
    hidden = [(f.name, Annotated[Any, Parameter(parse=False)], field(default=f.default))
              for f in fields(Settings) if f.name not in _KINDS]  # fmt: skip
    more = {"option": "--", "__module__": __name__}
    return make_dataclass("Options", [*own, *hidden], bases=(Settings,), frozen=True, namespace=more)


Options = _options()
DEFAULTS: Settings = Options()
Memory = Annotated[str | None, _option("memory")]
Threads = Annotated[int | None, _option("threads")]
Device = Annotated[str, _option("device")]
Overwrite = Annotated[bool, _option("overwrite")]
GoOn = Annotated[bool, Parameter(help="Go on from the last checkpoint of an interrupted run.")]

if TYPE_CHECKING:
    Run = Settings
else:
    Run = Annotated[Options, Parameter(name="*", group="Running")]


def chosen(**options: Any) -> Settings:
    """Settings from single options, for verbs that take few of them."""
    return Options(**options)


def read_recipe(file: Path, sets: Sequence[str], plugins: Sequence[Path], files: list[Path] | None = None) -> Recipe:
    """Load plug-ins, then the recipe with its overrides, one value each.  `files` takes the paths of all files read."""
    from weightsmith.core.errors import RecipeError

    found = read_variants(file, sets, plugins, files)
    if len(found) > 1:
        raise RecipeError(
            "--set: several values make a sweep, which merge and plan do; give one value, or [a, b] for a list"
        )
    return next(iter(found.values()))


def read_variants(
    file: Path, sets: Sequence[str], plugins: Sequence[Path], files: list[Path] | None = None
) -> Mapping[str, Recipe]:
    """Load plug-ins, then every recipe that `--set` options with several values stand for, by folder name."""
    from weightsmith.core.errors import RecipeError
    from weightsmith.plugins import load_file
    from weightsmith.recipe.sweep import load_variants

    for plugin in plugins:
        load_file(plugin)
    if files is not None:
        files += [plugin.expanduser() for plugin in plugins]
    try:
        return load_variants(file, sets, files)
    except RecipeError as error:
        from weightsmith.jobs.merge import also_wrong

        known = " ".join(one.text for one in error.problems)
        more = [one for one in also_wrong(file, sets) if one.text not in known]
        raise RecipeError(*error.problems, *more) from None
