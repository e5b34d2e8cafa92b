"""`weightsmith disentangle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, Json, Quiet, chosen
from weightsmith.cli.show import show_json, table
from weightsmith.cli.words import Parameter

__all__ = ["disentangle"]


def disentangle(
    base: Annotated[Path, Parameter(help="The model that both were fine-tuned from.")],
    first: Annotated[Path, Parameter(help="A fine-tuned model, linearised or ordinary.")],
    second: Annotated[Path, Parameter(help="Another, of the same kind.")],
    /,
    *,
    data: Annotated[tuple[Path, ...], Parameter(help="Texts or images of each, in order: give it twice.")],
    points: Annotated[int, Parameter(help="Coefficients on each side of the map.", show_default=True)] = 9,
    reach: Annotated[float, Parameter(help="The largest coefficient, up and down.", show_default=True)] = 2.0,
    examples: Annotated[int, Parameter(help="How many of each.", show_default=True)] = 128,
    length: Annotated[int, Parameter(help="Tokens per example.", show_default=True)] = 128,
    batch: Annotated[int, Parameter(help="Examples per forward pass.", show_default=True)] = 16,
    html: Annotated[Path | None, Parameter(help="Page with the map to write.")] = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how far two task vectors disturb each other: the share of answers that change when both are added."""
    from weightsmith.align.disentangled import disentangled
    from weightsmith.align.maps import as_page
    from weightsmith.io.disk import write_file

    found = disentangled(
        base, (first, second), data, points=points, reach=reach, examples=examples, length=length, batch=batch,
        device=chosen(device=device).device,
    )  # fmt: skip
    if html is not None:
        write_file(html, as_page(f"{first} and {second}", found.grid, found.error, (first.name, second.name)))
    if json:
        show_json({"grid": found.grid.tolist(), "error": found.error.tolist(), "linearized": found.linearized})
    elif not quiet:
        kind = "linearised" if found.linearized else "ordinary"
        pairs = [(a, b) for a, b in ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)) if reach >= 1]
        rows: list[tuple[object, ...]] = [(f"{a:g}", f"{b:g}", f"{found.at(a, b):.4f}") for a, b in pairs]
        rows.append(("all", "", f"{found.error.mean():.4f}"))
        table(f"disentanglement error of {kind} models, 0 to 2", (first.name, second.name, "error"), rows, (2,))
