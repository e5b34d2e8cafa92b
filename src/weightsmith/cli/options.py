"""Options that several verbs share, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from weightsmith.recipe.schema import Recipe

__all__ = [
    "Device",
    "Fingerprint",
    "Json",
    "Memory",
    "Out",
    "Overwrite",
    "Plugins",
    "Quiet",
    "RecipeFile",
    "Resume",
    "Sets",
    "Sweeps",
    "Threads",
    "bytes_of",
    "device_of",
    "read_recipe",
    "read_variants",
]

RecipeFile = Annotated[Path, Parameter(help="Recipe file, YAML or JSON.")]
Out = Annotated[Path, Parameter(help="Folder to write; it appears when it is complete.")]
Resume = Annotated[bool, Parameter(help="Go on where an interrupted run of the same stopped.")]
Overwrite = Annotated[bool, Parameter(help="Replace a folder that is not empty, as a whole.")]
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
Memory = Annotated[str | None, Parameter(help="Bound on peak memory, as 4GB.")]
Threads = Annotated[int | None, Parameter(help="Worker threads; default: all cores.")]
Device = Annotated[str, Parameter(help="auto, cpu, cuda (all GPUs) or cuda:N.", show_default=True)]
Fingerprint = Annotated[
    Literal["quick", "full"],
    Parameter(
        help="full: note a hash of all bytes of every input; they are read once more for that.", show_default=True
    ),
]
Json = Annotated[bool, Parameter(help="Print JSON for programs, and nothing else.")]
Quiet = Annotated[bool, Parameter(help="Print nothing but errors and warnings.")]


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
    from weightsmith.plugins import load_file
    from weightsmith.recipe.sweep import load_variants

    for plugin in plugins:
        load_file(plugin)
    if files is not None:
        files += [plugin.expanduser() for plugin in plugins]
    return load_variants(file, sets, files)


def bytes_of(text: str | None) -> int | None:
    """'4GB' -> 4_000_000_000."""
    from weightsmith.core.errors import RecipeError
    from weightsmith.recipe.schema import parse_size

    if text is None:
        return None
    try:
        count = parse_size(text)
    except ValueError as error:
        raise RecipeError(f"--memory: {error}") from None
    if count < 1:
        raise RecipeError(f"--memory {text} leaves nothing; write it like 4GB")
    return count


def threads_of(count: int | None) -> int | None:
    from weightsmith.core.errors import RecipeError

    if count is not None and count < 1:
        raise RecipeError(f"--threads {count} is outside [1, inf)")
    return count


def device_of(text: str) -> str:
    from weightsmith.core.errors import RecipeError, did_you_mean

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise RecipeError(f"--device: unknown device {text!r}{did_you_mean(text, ['auto', 'cpu', 'cuda', 'cuda:0'])}")
    return text
