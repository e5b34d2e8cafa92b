"""`weightsmith --install-completion`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from weightsmith.cli.show import say
from weightsmith.cli.words import Parameter
from weightsmith.core.errors import OutputError

__all__ = ["completion"]


def completion(
    *,
    shell: Annotated[Literal["bash", "zsh", "fish"] | None, Parameter(help="Default: the shell in use.")] = None,
    output: Annotated[Path | None, Parameter(help="Write the script here and change nothing else.")] = None,
) -> None:
    """Complete weightsmith's words in the shell."""
    from cyclopts.completion.detect import ShellDetectionError

    from weightsmith.cli.main import build

    try:
        path = build().install_completion(shell=shell, output=output, add_to_startup=output is None)
    except ShellDetectionError:
        raise OutputError("cannot tell which shell this is; say it with --shell bash, zsh or fish") from None
    except OSError as error:
        raise OutputError(f"cannot write the completion script: {error}") from None
    say(
        f"wrote {path}; " + ("it works in new shells" if output is None else "source it from your shell's startup file")
    )
