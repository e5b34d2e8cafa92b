"""What `audit` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsmith.cli.show import say, table

if TYPE_CHECKING:
    from weightsmith.protect.audit import Audit

__all__ = ["show"]


def show(found: Audit) -> None:
    """The tables, and then what they mean."""
    from weightsmith.protect.audit import plain_words
    from weightsmith.protect.outliers import CAVEAT
    from weightsmith.protect.report import tables

    for one in tables(found):
        table(*one)
    for line in plain_words(found):
        say(line)
    if not found.outliers:
        say("No tensor is unlike the others by these rules.")
    say(f"Of outliers: {CAVEAT}.")
