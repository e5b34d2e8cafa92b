"""`weightsmith train fuse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, GoOn, Json, Out, Overwrite, Quiet, Sets, chosen
from weightsmith.cli.show import duration, progress_bar, say, show_json, size, table
from weightsmith.cli.words import Parameter

__all__ = ["fuse"]


def fuse(
    recipe: Annotated[Path, Parameter(help="A target, sources and texts, YAML or JSON.")],
    out: Out,
    /,
    *,
    set_: Sets = (),
    device: Device = "auto",
    resume: GoOn = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train one language model on the next-token distributions of several, whatever their tokenizers (Fusion-X)."""
    from weightsmith.cli.shown.training import curve
    from weightsmith.train.fuse.recipe import load
    from weightsmith.train.fuse.run import train_fused

    files: list[Path] = []
    asked = load(recipe, set_, files)
    settings = chosen(resume=resume, overwrite=overwrite, files=tuple(files))
    with progress_bar("training", quiet=quiet or json, nbytes=False) as progress:
        result = train_fused(asked, out, settings.but(progress=progress), device=chosen(device=device).device)
    if json:
        show_json(result)
        return
    if not quiet:
        models = [
            (one.name, f"{one.loss:.4g}", f"{one.matched:.1%}", f"{one.weight:.3f}", f"{one.chosen:.1%}")
            for one in result.candidates
        ]
        table("Candidates", ["model", "loss per byte", "matched", "weight", "chosen"], models, right=(1, 2, 3, 4))
        curve(result.rows)
        for note in result.notes:
            say(f"note: {note}")
        if result.left_out:
            say(f"{result.left_out} texts of fewer than two tokens were left out")
        say(f"{result.trained:,} numbers trained on {result.examples} texts, {result.valid} kept for validation")
        say(f"optimizer state: {size(result.kept)}")
        say(f"wrote {result.out} in {duration(result.seconds)}; its curves are in {result.out / 'training.html'}")
