"""`weightsmith plan`, and the dry run of `weightsmith merge`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from weightsmith.cli.options import Json, Memory, Plugins, RecipeFile, Sets, Threads, bytes_of, read_recipe, threads_of
from weightsmith.cli.show import roughly, say, show_json, size, table

if TYPE_CHECKING:
    from weightsmith.recipe.schema import Recipe
    from weightsmith.run.plan import Plan

__all__ = ["plan", "preview"]


def plan(
    recipe: RecipeFile,
    out: Annotated[Path | None, Parameter(help="Folder to write; default: one in the working directory.")] = None,
    /,
    *,
    set_: Sets = (),
    memory: Memory = None,
    threads: Threads = None,
    json: Json = False,
    plugin: Plugins = (),
) -> int:
    """Show what would be read, done and written, and every problem, from file headers alone."""
    files: list[Path] = []
    made = read_recipe(recipe, set_, plugin, files)
    return preview(made, out, memory=memory, threads=threads, json=json, files=files)


def preview(
    recipe: Recipe,
    out: Path | None,
    *,
    memory: str | None,
    threads: int | None,
    json: bool,
    overwrite: bool = False,
    resume: bool = False,
    files: Sequence[Path] = (),
) -> int:
    """Print the plan; 0, or 2 if it has problems.  `files`: see `run`."""
    from weightsmith.io.output import check_output
    from weightsmith.method import Codec, registry
    from weightsmith.run.inputs import open_inputs
    from weightsmith.run.merge import reads
    from weightsmith.run.plan import make_plan

    inputs = open_inputs(recipe)
    encode = any(issubclass(registry(stage.name), Codec) for stage in recipe.method)
    made = make_plan(
        recipe,
        sources=inputs,
        memory=bytes_of(memory),
        threads=threads_of(threads),
        out=out or Path.cwd(),
        strict=False,
        encode=encode,
    )
    if out is not None:
        more = check_output(out, (*reads(recipe, inputs), *files), overwrite, resume, made.write_bytes)
        made = replace(made, problems=tuple(dict.fromkeys((*made.problems, *more))))
    if json:
        show_json(_facts(made))
    else:
        _show(made)
    return 2 if made.problems else 0


def _facts(made: Plan) -> dict[str, Any]:
    return {
        "inputs": made.inputs,
        "output": {**_output(made), "bytes": made.write_bytes},
        "coverage": made.coverage,
        "tasks": len(made.tasks),
        "passes": made.passes,
        "read_bytes": made.read_bytes,
        "write_bytes": made.write_bytes,
        "peak_bytes": made.peak_bytes,
        "seconds": made.seconds,
        "free_bytes": made.free_bytes,
        "threads": made.threads,
        "notes": made.notes,
        "problems": made.problems,
    }


def _output(made: Plan) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    for key in made.keys:
        kinds[key.dtype] = kinds.get(key.dtype, 0) + key.nbytes
    return {
        "tensors": len(made.keys),
        "parameters": sum(key.numel for key in made.keys),
        "dtypes": sorted(kinds, key=lambda dtype: -kinds[dtype]),
        "shard_size": made.recipe.output.shard_size,
    }


def _show(made: Plan) -> None:
    rows = [
        (
            i.name,
            i.role,
            i.label,
            i.tensors,
            size(i.nbytes),
            i.dtype,
            size(i.download_bytes) if i.download_bytes else "-",
        )
        for i in made.inputs
    ]
    table("Inputs", ("name", "role", "from", "tensors", "size", "dtype", "to download"), rows, right=(3, 4, 6))
    parts = [(c.description, c.tensors, f"{c.parameters:,}") for c in made.coverage]
    table("What happens to the tensors", ("what", "tensors", "parameters"), parts, right=(1, 2))
    output = _output(made)
    say(
        f"writes:   {size(made.write_bytes)}, {output['tensors']} tensors, {output['parameters']:,} parameters, "
        f"{', '.join(output['dtypes']) or 'nothing'}, files of up to {output['shard_size']}"
    )
    passes = f" (with {made.passes} measuring pass{'es' if made.passes > 1 else ''})" if made.passes else ""
    say(f"reads:    {size(made.read_bytes)}{passes}")
    say(f"memory:   {size(made.peak_bytes)} at most, with {made.threads} thread{'s' if made.threads != 1 else ''}")
    time = "not known: a method declares no cost"
    if made.seconds is not None:
        time = f"about {roughly(made.seconds)} on one core of the reference machine (rough; without downloads)"
    say(f"time:     {time}")
    if made.free_bytes is not None:
        say(f"disk:     {size(made.free_bytes)} free")
    for note in made.notes:
        say(f"note:     {note}")
    if made.problems:
        say(f"\n{len(made.problems)} problem{'s' if len(made.problems) != 1 else ''}:")
        for problem in made.problems:
            say(f"  - {problem}")
