"""`weightsmith check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, Json, chosen
from weightsmith.cli.show import show_json
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
    from weightsmith.cli.shown.check import show
    from weightsmith.observe.check import check as look

    report = look(
        out, text=text, length=length, device=chosen(device=device).device, trust_remote_code=trust_remote_code
    )
    if json:
        show_json(report)
    else:
        show(report)
    return 0 if report["ok"] else 2
