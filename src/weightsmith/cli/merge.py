"""`weightsmith merge`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from weightsmith.cli.options import (
    Device,
    Fingerprint,
    Json,
    Memory,
    Plugins,
    Quiet,
    RecipeFile,
    Sets,
    Threads,
    bytes_of,
    device_of,
    read_recipe,
    threads_of,
)
from weightsmith.cli.show import duration, files_in, progress_bar, say, show_json, size, warn

if TYPE_CHECKING:
    from weightsmith.run.merge import Result

__all__ = ["merge", "summary"]


def merge(
    recipe: RecipeFile,
    out: Annotated[Path, Parameter(help="Folder to write; it appears when it is complete.")],
    /,
    *,
    set_: Sets = (),
    dry_run: Annotated[bool, Parameter(help="Show the plan and stop.")] = False,
    memory: Memory = None,
    threads: Threads = None,
    device: Device = "auto",
    resume: Annotated[bool, Parameter(help="Go on where an interrupted run of this recipe stopped.")] = False,
    overwrite: Annotated[bool, Parameter(help="Replace a folder that is not empty, as a whole.")] = False,
    fingerprint: Fingerprint = "quick",
    json: Json = False,
    quiet: Quiet = False,
    plugin: Plugins = (),
) -> int:
    """Merge models as a recipe says, into a folder that transformers and others can load."""
    files: list[Path] = []
    made = read_recipe(recipe, set_, plugin, files)
    device_of(device)
    if dry_run:
        from weightsmith.cli.plan import preview

        return preview(
            made, out, memory=memory, threads=threads, json=json, overwrite=overwrite, resume=resume, files=files
        )
    from weightsmith.observe.consistency import cheap_check
    from weightsmith.run.merge import run

    limit, workers = bytes_of(memory), threads_of(threads)
    with progress_bar("merging", quiet=quiet or json) as progress:
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
    result = replace(result, warnings=(*result.warnings, *cheap_check(result.out)))
    summary(result, json=json, quiet=quiet, next_step=f'"weightsmith check {out}" sees whether it works')
    return 0


def summary(result: Result, *, json: bool, quiet: bool, next_step: str) -> None:
    """Say what a run has made: where, how large, how fast, and what to do next."""
    files, nbytes = files_in(result.out)
    rate = (result.read_bytes + result.write_bytes) / max(result.seconds, 1e-9)
    if json:
        show_json({
            "out": result.out,
            "files": files,
            "bytes": nbytes,
            "seconds": round(result.seconds, 3),
            "read_bytes": result.read_bytes,
            "write_bytes": result.write_bytes,
            "bytes_per_second": round(rate),
            "peak_bytes": result.peak_bytes,
            "storage": result.storage,
            "warnings": result.warnings,
        })  # fmt: skip
        return
    for text in result.warnings:
        warn(text)
    if not quiet:
        count = "1 file" if files == 1 else f"{files} files"
        say(f"wrote {result.out}: {size(nbytes)} in {count}, {duration(result.seconds)}, {size(rate)}/s in and out")
        if (kept := result.storage) is not None:
            beside = f" beside the base's {size(kept.base)}" if kept.base else ""
            who, taken = ("1 model", "it takes") if kept.count == 1 else (f"{kept.count} models", "they take")
            say(
                f"{who} in {size(kept.stored)}{beside}: "
                f"{kept.ratio:.0%} of the {size(kept.experts)} that {taken} in full"
            )
        say(f"next: {next_step}")
