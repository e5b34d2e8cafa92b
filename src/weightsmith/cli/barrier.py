"""`weightsmith barrier`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, Json, Quiet, chosen
from weightsmith.cli.show import progress_bar, say, show_json, table
from weightsmith.cli.words import Parameter

__all__ = ["barrier"]

_ACROSS = 8  # networks on each side of the plane: steps of 0.2 meet all three corners
_CORNERS = "The first model is at (0, 0), the second at (1, 0) downwards, the third at (0, 1) across."


def barrier(
    first: Annotated[Path, Parameter(help="Model at one end.")],
    second: Annotated[Path, Parameter(help="Model at the other end.")],
    /,
    *,
    data: Annotated[Path, Parameter(help="Texts (.txt, .jsonl), or images with labels (.npz).")],
    align: Annotated[Path | None, Parameter(help="Alignment of the second model; both lines are measured.")] = None,
    third: Annotated[Path | None, Parameter(help="A third model: the plane through all three is drawn too.")] = None,
    points: Annotated[int, Parameter(help="Networks on the line, its ends included.", show_default=True)] = 25,
    examples: Annotated[int, Parameter(help="How many examples to use.", show_default=True)] = 256,
    length: Annotated[int, Parameter(help="Tokens per example.", show_default=True)] = 512,
    batch: Annotated[int, Parameter(help="Examples per forward pass.", show_default=True)] = 8,
    html: Annotated[Path | None, Parameter(help="Page with the curves to write.")] = None,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure loss and accuracy on the straight line between two models, and how high it rises above its ends."""
    from weightsmith.align.barrier import Outcomes, as_page, curve, plane, recalibrate, rows
    from weightsmith.align.maps import square
    from weightsmith.io.disk import write_file
    from weightsmith.jobs.recipe import Recipe
    from weightsmith.observe.data import read_examples
    from weightsmith.observe.model import load_model
    from weightsmith.observe.outcomes import fed, outcomes

    one = load_model(first, device=chosen(device=device).device)
    read = read_examples(data, one, examples=examples, length=length)
    measure = lambda module: Outcomes(*outcomes(replace(one, module=module), read, batch))  # noqa: E731
    refresh = lambda module: recalibrate(module, lambda m: fed(replace(one, module=m), read, batch))  # noqa: E731
    found, drawn = {}, []
    with tempfile.TemporaryDirectory(prefix="weightsmith-line-") as folder:
        ends = {"as they are": second} | ({} if align is None else {"aligned": Path(folder) / "aligned"})
        if align is not None:
            placed = {"second": {"model": str(second), "align": str(align)}}
            Recipe.model_validate({"models": placed, "method": "linear"}).run(ends["aligned"])
        for title, end in ends.items():
            other = load_model(end, kind=one.kind, device=one.device).module
            with progress_bar(title, quiet=quiet or json, nbytes=False) as progress:
                found[title] = curve(one.module, other, measure, points=points, refresh=refresh, progress=progress)
        if third is not None:
            last = [
                load_model(end, kind=one.kind, device=one.device).module for end in (list(ends.values())[-1], third)
            ]
            grid, losses = plane((one.module, *last), measure, points=_ACROSS, refresh=refresh)
            drawn = [square("Loss on the plane", grid, losses, (second.name, third.name), "loss", _CORNERS)]
    if html is not None:
        write_file(html, as_page(f"From {first} to {second}", found, drawn))
    if json:
        more = {} if third is None else {"plane": {"grid": grid.tolist(), "loss": losses.tolist()}}
        show_json({title: c.plain() for title, c in found.items()} | more)
    elif not quiet:
        table(*rows(found))
        if third is not None:
            say(f"on the plane through all three: loss {losses.min():.4f} to {losses.max():.4f}; --html draws it")
