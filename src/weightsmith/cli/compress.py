"""`weightsmith compress`."""

from __future__ import annotations

from pathlib import Path

from weightsmith.cli.merge import summary
from weightsmith.cli.options import (
    Device,
    Fingerprint,
    Json,
    Memory,
    Out,
    Overwrite,
    Plugins,
    Quiet,
    RecipeFile,
    Resume,
    Sets,
    Threads,
    bytes_of,
    device_of,
    read_recipe,
    threads_of,
)
from weightsmith.cli.show import progress_bar

__all__ = ["compress"]


def compress(
    recipe: RecipeFile,
    out: Out,
    /,
    *,
    set_: Sets = (),
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    fingerprint: Fingerprint = "quick",
    json: Json = False,
    quiet: Quiet = False,
    plugin: Plugins = (),
) -> None:
    """Store all models of a recipe in little more space than one; its method ends in a codec."""
    from weightsmith.jobs.compress import compress as run

    files: list[Path] = []
    made = read_recipe(recipe, set_, plugin, files)
    limit, workers = bytes_of(memory), threads_of(threads)
    device_of(device)
    with progress_bar("compressing", quiet=quiet or json) as progress:
        result = run(
            made,
            out,
            memory=limit,
            threads=workers,
            device=device,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            files=files,
            fingerprint=fingerprint,
        )
    summary(
        result, json=json, quiet=quiet, next_step=f'"weightsmith restore {out} OUT --expert NAME" gets one model back'
    )
