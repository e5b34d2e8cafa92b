"""`weightsmith align`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Json, Overwrite, Quiet
from weightsmith.cli.show import progress_bar
from weightsmith.cli.shown.geometry import Batch, By, Data, Epochs, Examples, Length, Rate, show_alignment
from weightsmith.cli.words import Parameter
from weightsmith.core.errors import RecipeError

__all__ = ["align"]

_FREEZE = (
    "Group, or kind of group, that stays; may be repeated.  Default: the residual stream of models that come from one"
)
_OUT = "Folder to write: index vectors, which recipes name as `align`; with --bases a whole model."
_BASES = "Also undo scales and changes of basis inside heads, and write the model so; it computes the same."


def align(
    moving: Annotated[Path, Parameter(help="The model whose units are put into another order.")],
    /,
    *,
    to: Annotated[Path | None, Parameter(help="The model in whose order they are put.")] = None,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"], help=_OUT)] = None,
    show: Annotated[bool, Parameter(help="List what may be permuted and what not, with the reason.")] = False,
    freeze: Annotated[tuple[str, ...], Parameter(help=f"{_FREEZE}; `nothing` frees that too.")] = (),
    keep: Annotated[float | None, Parameter(help="Share of MLP units that stay separate (PLeaS).")] = None,
    budget: Annotated[float | None, Parameter(help="Instead: its operations per operation of one model.")] = None,
    bases: Annotated[bool, Parameter(help=_BASES)] = False,
    restarts: Annotated[int, Parameter(help="Times to begin anew; the best is kept.", show_default=True)] = 1,
    normalize: Annotated[bool, Parameter(help="Every tensor counts alike, however large its numbers.")] = False,
    spectra: Annotated[bool, Parameter(help="Also measure how singular vectors lie to each other.")] = False,
    by: By = "weights",
    data: Data = None,
    examples: Examples = 64,
    length: Length = 256,
    batch: Batch = 8,
    epochs: Epochs = 1,
    lr: Rate = 1e-2,
    seed: Annotated[int, Parameter(help="Of the order in which groups are gone through.", show_default=True)] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put one model's hidden units, heads and experts into the order of another's, so that averages make sense."""
    from weightsmith.align.run import Settings, symmetries
    from weightsmith.align.run import align as run

    if not show and (to is None or out is None):
        raise RecipeError("write: weightsmith align MOVING --to REFERENCE --out FOLDER; or --show for what may move")
    if bases:
        odd = {"--freeze": freeze, "--keep": keep, "--budget": budget, "--data": data, "--normalize": normalize,
               "--spectra": spectra, "--show": show, "--by": by != "weights", "--restarts": restarts != 1}  # fmt: skip
        if named := [name for name, value in odd.items() if value not in (None, False, ())]:
            raise RecipeError(f"--bases finds everything by least squares, layer by layer; leave out {named[0]}")
        return _in_basis(moving, to, out, overwrite, json=json, quiet=quiet)
    found = None
    if not (show or to is None or out is None):
        settings = Settings(freeze or None, restarts, 100, seed, normalize, spectra, keep, budget, by,
                            None if data is None else str(data), examples, length, batch, epochs, lr)  # fmt: skip
        with progress_bar("matching", quiet=quiet or json, nbytes=False) as progress:
            found = run(str(moving), str(to), out, settings, overwrite=overwrite, progress=progress)
    layout = symmetries(str(moving)) if found is None else found.layout
    show_alignment(layout, found, (moving, to, out), json=json, quiet=quiet)


def _in_basis(moving: Path, to: Path | None, out: Path | None, overwrite: bool, *, json: bool, quiet: bool) -> None:
    from weightsmith.align.towards import towards
    from weightsmith.cli.options import chosen
    from weightsmith.cli.shown.geometry import show_basis

    assert to is not None
    assert out is not None
    with progress_bar("writing", quiet=quiet or json) as progress:
        found = towards(moving, to, out, settings=chosen(overwrite=overwrite, progress=progress))
    show_basis(found, json=json, quiet=quiet)
