"""Studies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.cli.options import chosen
from weightsmith.cli.show import progress_bar, say, show_json
from weightsmith.cli.shown.tables import show_tables

if TYPE_CHECKING:
    from weightsmith.study.bench import Result

__all__ = ["run_studies", "show"]


def show(results: Iterable[Result]) -> None:
    from weightsmith.study.show import in_words, tables

    for result in results:
        say()
        show_tables(tables(result))
        for line in in_words(result):
            say(f"- {line}")
        say()


def run_studies(
    files: Sequence[Path], out: Path | None, settings: Mapping[str, Any], json: bool, quiet: bool, **more: Any
) -> None:
    """Run studies of one's own, write their pages, show the tables."""
    from weightsmith.study.bench import bench, plain
    from weightsmith.study.pages import write_pages
    from weightsmith.study.schema import load_study

    read = [load_study(path) for path in files]
    folder = out if out is not None else read[0].file.parent / "bench"
    silent = quiet or json
    with progress_bar("benching", quiet=silent, nbytes=False) as progress:
        told = None if silent else say
        results = bench(read, folder, chosen(**settings, progress=progress), say=told, **more)
    pages = write_pages(results, folder)
    if json:
        show_json(plain(results))
    elif not quiet:
        show(results)
        say("wrote " + ", ".join(map(str, pages)))
