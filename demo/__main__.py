"""Train two families of models, merge them with the command `weightsmith merge`, and show what each merge keeps.

    python -m demo               minutes the first time; after that checkpoints and scores are cached
    python -m demo --markdown    also write docs/demo.md and docs/demo.svg

Everything is kept in .demo/; delete the folder to start afresh.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from demo.results import Result

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".demo"


def narrator() -> Callable[[str], None]:
    """A function that prints a line with the seconds since the start."""
    began = time.perf_counter()
    return lambda text: print(f"{time.perf_counter() - began:6.1f} s  {text}", flush=True)


def measure(home: Path, say: Callable[[str], None]) -> list[Result]:
    """Train, merge and score both families."""
    say("loading torch")
    import torch

    from demo.digits import Digits
    from demo.results import measured
    from demo.text import Text

    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # a guard against bugs of one's own; a tenth of the time
    )
    digits = measured(Digits(), home, say)
    say("text: collecting files of installed packages")
    return [digits, measured(Text(home), home, say)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="also write docs/demo.md and docs/demo.svg")
    chosen = parser.parse_args(arguments)
    results = measure(HOME, narrator())

    from demo.results import document, markdown_page, picture, table
    from weightsmith.report.table import rich_table

    (HOME / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1), "utf-8")
    page = HOME / "demo.html"
    page.write_text(document(results), "utf-8")
    if chosen.markdown:
        (ROOT / "docs" / "demo.svg").write_text(picture(results), "utf-8")
        (ROOT / "docs" / "demo.md").write_text(markdown_page(results), "utf-8")

    from rich.console import Console

    for result in results:
        shown_table = rich_table(table(result))
        needed = Console(width=1000).measure(shown_table).maximum  # a table squeezed into 80 columns cannot be read
        print()
        Console(width=max(Console().width, needed)).print(shown_table)
    example = next(row for row in results[-1].rows if row.name == "TIES")
    print(f"\nPlots: {page}")
    print(f"Try next: change a number in {shown(example.recipe)}, then run")
    print(f"  {shown(str(Path(sys.executable).with_name('weightsmith')))} merge {shown(example.recipe)} my-merge")


def shown(path: str) -> str:
    """A path as short as it can be written from here."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


if __name__ == "__main__":
    main()
