"""What `align` and `barrier` share with nothing else: options about data, and what they print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from weightsmith.cli.show import progress_bar, say, show_json, table
from weightsmith.cli.words import Parameter
from weightsmith.core.errors import RecipeError

if TYPE_CHECKING:
    import numpy as np

    from weightsmith.align.barrier import Curve, Measure
    from weightsmith.align.layout import Layout
    from weightsmith.align.run import Aligned, Settings

__all__ = [
    "Batch",
    "By",
    "Data",
    "Epochs",
    "Examples",
    "Freeze",
    "Html",
    "Length",
    "OfBases",
    "Rate",
    "Third",
    "Written",
    "drawn_plane",
    "show_alignment",
    "show_lines",
    "write_alignments",
]

_ACROSS = 8  # networks on each side of the plane: steps of 0.2 meet all three corners
_CORNERS = "The first model is at (0, 0), the second at (1, 0) downwards, the third at (0, 1) across."

_FREEZE = (
    "Group, or kind of group, that stays; may be repeated.  Default: the residual stream of models that come from one; "
    "`nothing` frees that too."
)
_OUT = "Folder to write: index vectors, which recipes name as `align`; with --bases a whole model."
_BASES = "Also undo scales and changes of basis inside heads, and write the model so; it computes the same."

Freeze = Annotated[tuple[str, ...], Parameter(help=_FREEZE)]
Written = Annotated[Path | None, Parameter(name=["--out", "-o"], help=_OUT)]
OfBases = Annotated[bool, Parameter(help=_BASES)]
By = Annotated[Literal["weights", "activations", "ste"], Parameter(help="What is matched; ste learns with gradients.")]
Data = Annotated[
    Path | None, Parameter(help="Texts, or images (.npz): for activations, ste, and to fit partial merges.")
]
Examples = Annotated[int, Parameter(help="How many of them.", show_default=True)]
Length = Annotated[int, Parameter(help="Tokens per example.", show_default=True)]
Batch = Annotated[int, Parameter(help="Examples per forward pass.", show_default=True)]
Epochs = Annotated[int, Parameter(help="Of ste: times through the data.", show_default=True)]
Rate = Annotated[float, Parameter(help="Of ste: learning rate.", show_default=True)]

Html = Annotated[Path | None, Parameter(help="Page with the curves to write.")]
Points = Annotated[int, Parameter(help="Networks on the line, its ends included.", show_default=True)]
Third = Annotated[Path | None, Parameter(help="A third model: the plane through all three is drawn too.")]


def write_alignments(
    moving: Sequence[Path], to: Path, out: Path, settings: Settings, overwrite: bool, *, json: bool, quiet: bool
) -> None:
    """Of one model to a folder; of several, each onto the mean of all others, to folders of their names in it."""
    from weightsmith.align.report import plain
    from weightsmith.align.run import align
    from weightsmith.align.several import align_all

    models = {path.resolve().name: str(path) for path in moving}
    if len(models) < len(moving):
        raise RecipeError("two of the models have one name, which their folders of index vectors would have, too")
    with progress_bar("matching", quiet=quiet or json, nbytes=False) as progress:
        if len(moving) == 1:
            one = align(str(moving[0]), str(to), out, settings, overwrite=overwrite, progress=progress)
            found = {"": one}
        else:
            found = align_all(models, str(to), out, settings, overwrite=overwrite, progress=progress)
    if json and len(moving) > 1:
        return show_json({name: plain(one.layout, one) for name, one in found.items()})
    for path, (name, one) in zip(moving, found.items(), strict=True):
        show_alignment(one.layout, one, (path, to, out / name), json=json, quiet=quiet)


def show_alignment(
    layout: Layout, found: Aligned | None, words: tuple[Any, Any, Any] | tuple[()], *, json: bool, quiet: bool
) -> None:
    """What may be permuted, and what was; words: the moving model, the reference and the folder."""
    from weightsmith.align.report import plain, summary, tables

    if json:
        show_json(plain(layout, found))
    elif not quiet:
        for one in tables(layout, found):
            table(*one)
        for line in summary(found, *words) if found and words else ():
            say(line)


def measures(one: Any, read: Sequence[Any], batch: int) -> tuple[Measure, Any]:
    """What a network makes of examples, and what recomputes its batch statistics on them; one: a loaded model."""
    from dataclasses import replace

    from weightsmith.align.barrier import Outcomes, recalibrate
    from weightsmith.observe.outcomes import fed, outcomes

    def measure(module: Any) -> Outcomes:
        return Outcomes(*outcomes(replace(one, module=module), read, batch))

    return measure, lambda module: recalibrate(module, lambda m: fed(replace(one, module=m), read, batch))


def drawn_plane(one: Any, ends: Sequence[Path], names: tuple[str, str], measure: Measure, refresh: Any) -> Any:
    """The plane through a loaded model and two more: (coordinates, losses), and sections of a page."""
    from weightsmith.align.barrier import plane
    from weightsmith.align.maps import square
    from weightsmith.observe.model import load_model

    last = [load_model(end, kind=one.kind, device=one.device).module for end in ends]
    seen = plane((one.module, *last), measure, points=_ACROSS, refresh=refresh)
    return seen, [square("Loss on the plane", *seen, names, "loss", _CORNERS)]


def show_lines(
    found: Mapping[str, Curve], plane: tuple[np.ndarray, np.ndarray] | None, *, json: bool, quiet: bool
) -> None:
    """Lines between models, and the plane through three: coordinates and losses."""
    from weightsmith.align.barrier import rows

    if json:
        more = {} if plane is None else {"plane": {"grid": plane[0].tolist(), "loss": plane[1].tolist()}}
        show_json({title: c.plain() for title, c in found.items()} | more)
    elif not quiet:
        table(*rows(found))
        if plane is not None:
            low, high = plane[1].min(), plane[1].max()
            say(f"on the plane through all three: loss {low:.4f} to {high:.4f}; --html draws it")
