"""`weightsmith check`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from weightsmith.cli.options import Device, Json, chosen
from weightsmith.cli.show import say, show_json, table, warn
from weightsmith.cli.words import Parameter

__all__ = ["check"]


def check(
    out: Annotated[Path, Parameter(help="Folder with the model.")],
    /,
    *,
    text: Annotated[Path | None, Parameter(help="UTF-8 file to measure perplexity on; default: some English.")] = None,
    length: Annotated[int, Parameter(help="Tokens of context.")] = 512,
    device: Device = "auto",
    trust_remote_code: Annotated[bool, Parameter(help="Let the checkpoint's own python code run.")] = False,
    json: Json = False,
) -> int:
    """Load a result, run it, and compare its perplexity (or else its outputs) with its parents'."""
    from weightsmith.observe.check import check as look

    report = look(
        out, text=text, length=length, device=chosen(device=device).device, trust_remote_code=trust_remote_code
    )
    if json:
        show_json(report)
    else:
        _show(report)
    return 0 if report["ok"] else 2


def _show(report: dict[str, Any]) -> None:
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
    return "all values are finite; there is no model to run" if report["kind"] == "tensors" else "works"
