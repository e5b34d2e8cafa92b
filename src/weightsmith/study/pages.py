"""The files that a study leaves: figures for programs, a page to look at, tables to paste."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from weightsmith import __version__
from weightsmith.io.disk import write_file
from weightsmith.study.bench import Result, plain
from weightsmith.study.show import document, markdown_page, picture

__all__ = ["write_pages"]


def write_pages(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write results.json, results.md, results.html and results.svg; returns their paths.

    Raises OutputError if the folder cannot be written.
    """
    texts = {
        "results.json": json.dumps({"weightsmith": __version__, "results": plain(results)}, indent=1) + "\n",
        "results.md": markdown_page(results),
        "results.html": document(results),
        "results.svg": picture(results),
    }
    return [write_file(folder / name, text) for name, text in texts.items() if text]
