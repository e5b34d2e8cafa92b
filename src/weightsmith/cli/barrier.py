"""`weightsmith barrier`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, Json, Quiet, chosen
from weightsmith.cli.show import progress_bar
from weightsmith.cli.shown.geometry import Batch, Examples, Html, Length, Points, Third, drawn_plane, measures
from weightsmith.cli.shown.geometry import show_lines as shown
from weightsmith.cli.words import Parameter

__all__ = ["barrier"]


def barrier(
    first: Annotated[Path, Parameter(help="Model at one end.")],
    second: Annotated[Path, Parameter(help="Model at the other end.")],
    /,
    *,
    data: Annotated[Path, Parameter(help="Texts (.txt, .jsonl), or images with labels (.npz).")],
    align: Annotated[Path | None, Parameter(help="Alignment of the second model; both lines are measured.")] = None,
    third: Third = None,
    points: Points = 25,
    examples: Examples = 256,
    length: Length = 512,
    batch: Batch = 8,
    html: Html = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure loss and accuracy on the straight line between two models, and how high it rises above its ends."""
    from weightsmith.align.barrier import as_page, curve
    from weightsmith.io.disk import write_file
    from weightsmith.jobs.recipe import Recipe
    from weightsmith.observe.data import read_examples
    from weightsmith.observe.model import load_model

    one = load_model(first, device=chosen(device=device).device)
    read = read_examples(data, one, examples=examples, length=length)
    measure, refresh = measures(one, read, batch)
    found, drawn, seen = {}, [], None
    with tempfile.TemporaryDirectory(prefix="weightsmith-line-") as folder:
        ends = {"as they are": second}
        if align is not None:
            ends["aligned"], ref = Path(folder) / "aligned", {"model": str(second), "align": str(align)}
            Recipe.model_validate({"models": {"second": ref}, "method": "linear"}).run(ends["aligned"])
        for title, end in ends.items():
            other = load_model(end, kind=one.kind, device=one.device).module
            with progress_bar(title, quiet=quiet or json, nbytes=False) as progress:
                found[title] = curve(one.module, other, measure, points=points, refresh=refresh, progress=progress)
        if third is not None:
            seen, drawn = drawn_plane(one, ([*ends.values()][-1], third), (second.name, third.name), measure, refresh)
    if html is not None:
        write_file(html, as_page(f"From {first} to {second}", found, drawn))
    shown(found, seen, json=json, quiet=quiet)
