"""What a check found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weightsmith.cli.show import say, table, warn

__all__ = ["show"]


def show(report: Mapping[str, Any]) -> None:
    rows = [
        (name, f"{found['perplexity']:.3f}", f"{found['bits_per_byte']:.4f}", found["tokens"])
        for name, found in report["models"].items()
        if "perplexity" in found
    ]
    alike = [
        (
            name,
            f"{found['cosine']:.4f}",
            f"{found['lowest']:.4f}",
            f"{found['agreement']:.1%}" if "agreement" in found else "-",
        )
        for name, found in report["models"].items()
        if "cosine" in found
    ]
    title = "Outputs beside those of the parents, on the same inputs"
    table(title, ("model", "mean cosine", "lowest", "same answer"), alike, right=(1, 2, 3))
    table("Perplexity", ("model", "per token", "bits per byte", "tokens"), rows, right=(1, 2, 3))
    scores = {name: one for found in report["scores"].values() for name, one in found.items()}
    rows = [(name, *(f"{found[key]:.5g}" if key in found else "-" for key in scores))
            for name, found in report["scores"].items()]  # fmt: skip
    table("Scores", ("model", *scores), rows, right=tuple(range(1, len(scores) + 1)))
    for name, answer in report["answers"].items():
        say(f"{name} answers: {answer}")
    for name, reason in report["missing"].items():
        say(f"note: {name} is not compared: {reason}")
    for note in report["notes"]:
        say(f"note: {note}")
    for text in report["warnings"]:
        warn(text)
    for problem in report["problems"]:
        say(f"problem: {problem}")
    say(f"{report['path']}: {_verdict(report)}")


def _verdict(report: Mapping[str, Any]) -> str:
    """In a word what was found; a state dict without a model is only looked at, not run."""
    if not report["ok"]:
        return "does not work"
    if report["ran"]:
        return "runs, but is far from its parents" if report["unlike"] else "works"
    return "all values are finite; " + ("there is no model to run" if report["kind"] == "tensors" else "it was not run")
