"""`weightsmith train`: one task; `multitask` several; `fuse` from several models; `router` what chooses experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, GoOn, Json, Out, Overwrite, Quiet, Sets, chosen
from weightsmith.cli.show import duration, progress_bar, say, show_json, size
from weightsmith.cli.train.fuse import fuse
from weightsmith.cli.train.multitask import multitask
from weightsmith.cli.train.router import router
from weightsmith.cli.words import Parameter, Verbs

__all__ = ["train"]


def one(
    recipe: Annotated[Path, Parameter(help="What to train on what, YAML or JSON.")],
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
    """Fine-tune one model, or its singular values: a baseline for merges, or an expert for them."""
    from weightsmith.cli.shown.training import curve
    from weightsmith.observe.data import read_examples
    from weightsmith.observe.model import load_model
    from weightsmith.train.recipe import load
    from weightsmith.train.run import train as run

    files: list[Path] = []
    asked = load(recipe, set_, files)
    loaded = load_model(asked.model, device=chosen(device=device).device)
    found = read_examples(
        asked.data, loaded, examples=asked.examples, length=asked.length, seed=asked.seed, field=asked.field
    )
    settings = chosen(resume=resume, overwrite=overwrite, files=(*files, Path(asked.data)))
    with progress_bar("training", quiet=quiet or json, nbytes=False) as progress:
        result = run(asked, loaded, found, out, settings.but(progress=progress))
    if json:
        show_json(result)
        return
    if not quiet:
        curve(result.rows)
        say(f"{result.trained:,} numbers trained on {result.examples} examples, {result.valid} kept for validation")
        say(f"optimizer state: {size(result.kept)}, {result.projected} matrices in subspaces")
        say(f"wrote {result.out} in {duration(result.seconds)}; its curve is in {result.out / 'training.html'}")


_HELP = "Fine-tune one model, or its singular values: a baseline for merges, or an expert for them."
train = Verbs(_HELP, (fuse, multitask, router), one)
