"""Soups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsmith.cli.show import say, show_json, table, warn

if TYPE_CHECKING:
    from weightsmith.jobs.soup import FolderSoup

__all__ = ["summary"]


def summary(made: FolderSoup, *, json: bool, quiet: bool) -> None:
    if json:
        trials = [{"models": names, "score": score, "kept": kept} for names, score, kept in made.trials]
        show_json({
            "out": made.result.out, "models": made.members, "score": made.score, "trials": trials,
            "warnings": made.result.warnings,
        })  # fmt: skip
        return
    for text in made.result.warnings:
        warn(text)
    if quiet:
        return
    rows = [(f"{score:.6g}", names[-1], "kept" if kept else "left out") for names, score, kept in made.trials]
    table("Greedy soup", ("score with it", "model", ""), rows, right=(0,))
    reached = "" if made.score is None else f", score {made.score:.6g}"
    say(f"wrote {made.result.out}: {len(made.members)} models, {', '.join(made.members)}{reached}")
    say(f'next: "weightsmith check {made.result.out}" sees whether it works')
