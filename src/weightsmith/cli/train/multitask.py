"""`weightsmith train multitask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, GoOn, Json, Out, Overwrite, Quiet, Sets, chosen
from weightsmith.cli.show import duration, progress_bar, say, show_json, size, table
from weightsmith.cli.words import Parameter

__all__ = ["multitask"]


def multitask(
    tasks: Annotated[Path, Parameter(help="Tasks, a model, and how one does them all, YAML or JSON.")],
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
    """Train one model for several tasks: what merges of single-task models are compared with."""
    from weightsmith.train.multitask.recipe import load
    from weightsmith.train.multitask.run import train_multitask

    files: list[Path] = []
    asked = load(tasks, set_, files)
    settings = chosen(resume=resume, overwrite=overwrite, files=tuple(files))
    with progress_bar("training", quiet=quiet or json, nbytes=False) as progress:
        result = train_multitask(asked, out, settings.but(progress=progress), device=chosen(device=device).device)
    if json:
        show_json(result)
        return
    if not quiet:
        first, last = result.rows[0].figures, result.rows[-1].figures
        rows = []
        for name, n in result.examples.items():
            seen = [own.get(f"{name}/{key}") for key in ("valid", "score") for own in (first, last)]
            figures = ("" if v is None else f"{v:.4g}" for v in (*seen, result.scores.get(name)))
            rows.append((name, str(n), *figures))
        heads = ["task", "examples", "loss before", "loss", "score before", "score", "test"]
        table("Tasks", heads, rows, right=tuple(range(1, 7)))
        for note in result.notes:
            say(note)
        for name, count in result.skipped.items():
            say(f"{name}: {count} steps without a usable gradient were skipped")
        say(f"{result.trained:,} numbers trained; optimizer state: {size(result.kept)}")
        say(f"wrote {result.out} in {duration(result.seconds)}; its curves are in {result.out / 'training.html'}")
        say("in a study: joint: OUT, and evaluate: {tasks: {recipe: TASKS.yaml}}")
