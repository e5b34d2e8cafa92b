"""`weightsmith.Recipe`: the recipe that can be loaded and run.

The grammar (`weightsmith.recipe`) knows nothing of running, so this is a class of its own, above both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from weightsmith.recipe import schema
from weightsmith.recipe.load import read_file

if TYPE_CHECKING:
    from weightsmith.jobs.job import Result

__all__ = ["Recipe"]


class Recipe(schema.Recipe):
    __doc__ = schema.Recipe.__doc__

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML or JSON file; see `weightsmith.recipe.load.read_file`."""
        return read_file(cls, path, overrides)

    def run(self, out: str | Path, **options: Any) -> Result:
        """Merge into a folder; the options are the fields of `Settings` (memory, threads, device, resume, ...)."""
        from weightsmith.jobs.merge import run  # the engine is loaded when it is asked for

        return run(self, Path(out), **options)
