"""`weightsmith align`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Json, Overwrite, Quiet
from weightsmith.cli.shown.geometry import Batch, By, Data, Epochs, Examples, Freeze, Length, OfBases, Rate, Written
from weightsmith.cli.words import Parameter
from weightsmith.core.errors import RecipeError

__all__ = ["align"]


def align(
    *moving: Annotated[Path, Parameter(help="The model whose units are put into another order; or several.")],
    to: Annotated[Path | None, Parameter(help="The model in whose order they are put.")] = None,
    out: Written = None,
    show: Annotated[bool, Parameter(help="List what may be permuted and what not, with the reason.")] = False,
    freeze: Freeze = (),
    keep: Annotated[float | None, Parameter(help="Share of MLP units that stay separate (PLeaS).")] = None,
    budget: Annotated[float | None, Parameter(help="Instead: its operations per operation of one model.")] = None,
    bases: OfBases = False,
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
    from weightsmith.align import run
    from weightsmith.cli.shown import basis, geometry

    if not moving or (not show and (to is None or out is None)) or (show and len(moving) > 1):
        raise RecipeError(
            "write: weightsmith align MOVING --to REFERENCE --out FOLDER; or MOVING --show for what may move"
        )
    if bases and to is not None and out is not None:
        more = {"--freeze": freeze, "--keep": keep, "--budget": budget, "--data": data, "--normalize": normalize,
                "--spectra": spectra, "--by": by != "weights", "--restarts": restarts > 1, "--show": show,
                "all models but one": moving[1:]}  # fmt: skip
        return basis.write_in_basis(moving[0], to, out, overwrite, more, json=json, quiet=quiet)
    if show or to is None or out is None:
        return geometry.show_alignment(run.symmetries(str(moving[0])), None, (), json=json, quiet=quiet)
    settings = run.Settings(freeze or None, restarts, 100, seed, normalize, spectra, keep, budget, by,
                            None if data is None else str(data), examples, length, batch, epochs, lr)  # fmt: skip
    geometry.write_alignments(moving, to, out, settings, overwrite, json=json, quiet=quiet)
