"""What `weightsmith search` shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.cli.show import say, show_json
from weightsmith.cli.shown.tables import show_tables
from weightsmith.core.errors import RecipeError

if TYPE_CHECKING:
    from weightsmith.search.result import Found
    from weightsmith.search.run import Search

__all__ = ["picked", "planned", "show"]


def planned(work: Search, *, json: bool, quiet: bool) -> None:
    """What a search would do."""
    if json:
        show_json({"plan": work.plan()})
    elif not quiet:
        for line in work.plan():
            say(line)


def show(made: Found | None, *, json: bool, quiet: bool) -> None:
    """The final table and what to do next."""
    if made is None:
        return
    from weightsmith.search.pages import table, words
    from weightsmith.search.result import plain

    if json:
        show_json(plain(made))
        return
    if quiet:
        return
    for line in words(made):
        say(line)
    show_tables([table(made)])
    out = made.search.out
    more = f", {out / 'front.html'}" if made.front else ""
    say(f"wrote {out / 'recipe.yaml'}, {out / 'report.html'}{more}")
    say(f'next: "weightsmith merge {out / "recipe.yaml"} MERGED"')


def picked(out: Path, prefer: str | None, to: Path | None, *, json: bool) -> None:
    """The point of a front that a preference likes best."""
    from weightsmith.search.pages import write_pick

    if prefer is None:
        raise RecipeError("pick needs a preference, as --prefer math=2,code=1")
    found = write_pick(out, prefer, to)
    if json:
        show_json(found)
        return
    scores = ", ".join(f"{name} {value:.6g}" for name, value in found["scores"].items())
    say(f"candidate {found['candidate']}: {scores}")
    say(f'next: "weightsmith merge {found["recipe"]} MERGED"')
