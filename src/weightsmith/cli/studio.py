"""`weightsmith studio`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from weightsmith.cli.show import say
from weightsmith.cli.words import Parameter
from weightsmith.core.errors import RecipeError

__all__ = ["studio"]

_FOLDERS = "Folders with models and recipes; nothing outside them is shown.  Default: the working directory."
_SCORES = (
    "Python file that defines scores(model, split), or a command that prints JSON; run when a page asks for scores."
)


def studio(
    *folders: Annotated[Path, Parameter(help=_FOLDERS)],
    port: Annotated[int, Parameter(help="Port on this machine; 0: any that is free.", show_default=True)] = 8323,
    no_browser: Annotated[bool, Parameter(help="Only print the address.")] = False,
    evaluator: Annotated[str | None, Parameter(help=_SCORES)] = None,
) -> None:
    """Merge, look and compare in a browser, on this machine only."""
    from weightsmith.studio.serve import serve

    if not 0 <= port <= 65535:
        raise RecipeError(f"--port {port} is outside [0, 65535]")

    def spoken(text: str) -> None:
        say(text)
        sys.stdout.flush()

    serve(folders or (Path(),), port, not no_browser, spoken, evaluator)
