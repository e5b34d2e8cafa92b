"""`weightsmith audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Json, Quiet
from weightsmith.cli.show import progress_bar, show_json
from weightsmith.cli.words import Parameter

__all__ = ["audit"]

_DATA = "Texts, or labelled images: merges are made and scored on them."
_EXPERT = "Another fine-tune of the base: partner of merges, and what tensors are compared with; may be repeated."


def audit(
    model: Annotated[Path, Parameter(help="The model, locked or a stranger's.")],
    /,
    *,
    base: Annotated[Path, Parameter(help="The public model that it was made from.")],
    expert: Annotated[tuple[Path, ...], Parameter(help=_EXPERT)] = (),
    data: Annotated[Path | None, Parameter(help=_DATA)] = None,
    unlocked: Annotated[Path | None, Parameter(help="The model before it was locked, if it is yours.")] = None,
    examples: Annotated[int, Parameter(help="How many examples to use.", show_default=True)] = 64,
    length: Annotated[int, Parameter(help="Tokens per example.", show_default=True)] = 256,
    html: Annotated[Path | None, Parameter(help="Page with the tables to write.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a lock is worth: merge with the model, run the known attack on it, merge again; and what is strange."""
    from weightsmith.cli.shown.audit import show
    from weightsmith.io.disk import write_file
    from weightsmith.protect.audit import audit as run
    from weightsmith.protect.report import as_page, plain

    names = [path.name for path in expert]
    named = {str(p) if names.count(p.name) > 1 else p.name: p for p in expert}
    with progress_bar("merging", quiet=quiet or json, nbytes=False) as progress:
        found = run(
            model, base, experts=named, unlocked=unlocked, data=data, examples=examples, length=length,
            progress=progress,
        )  # fmt: skip
    if html is not None:
        write_file(html, as_page(found))
    if json:
        show_json(plain(found))
    elif not quiet:
        show(found)
