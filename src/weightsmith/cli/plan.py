"""`weightsmith plan`, and the dry run of `weightsmith merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from weightsmith.cli.options import DEFAULTS, Json, Plugins, RecipeFile, Run, Sweeps, read_variants
from weightsmith.cli.show import roughly, say, show_json, size, table
from weightsmith.cli.words import Parameter
from weightsmith.core.problem import Problem
from weightsmith.core.settings import Settings

if TYPE_CHECKING:
    from weightsmith.plan.plan import Plan
    from weightsmith.plan.room import Room
    from weightsmith.recipe.schema import Recipe

__all__ = ["plan", "preview"]


def plan(
    recipe: RecipeFile,
    out: Annotated[Path | None, Parameter(help="Folder to write; default: one in the working directory.")] = None,
    /,
    *,
    set_: Sweeps = (),
    settings: Run = DEFAULTS,
    json: Json = False,
    plugin: Plugins = (),
) -> int:
    """Show what would be read, done and written, and every problem, from file headers alone."""
    files: list[Path] = []
    variants = read_variants(recipe, set_, plugin, files)
    return preview(variants, out, settings.but(files=files), json=json)


def preview(variants: Mapping[str, Recipe], out: Path | None, settings: Settings, *, json: bool) -> int:
    """Print the plan, or what the plans of a sweep come to; 0, or 2 if there are problems."""
    if len(variants) > 1:
        return _preview_all(variants, out or Path.cwd(), settings, json=json)
    (recipe,) = variants.values()
    from weightsmith.jobs.merge import preview as plan_of

    made = plan_of(recipe, out, settings)
    if json:
        show_json(_facts(made))
    else:
        _show(made)
    return 2 if made.problems else 0


def _preview_all(variants: Mapping[str, Recipe], out: Path, settings: Settings, *, json: bool) -> int:
    from weightsmith.jobs.sweep import plan_sweep

    made = plan_sweep(variants, out, settings)
    if json:
        show_json({
            "out": made.out,
            "variants": {name: _facts(plan) for name, plan in made.plans.items()},
            "read_bytes": made.read_bytes,
            "write_bytes": made.write_bytes,
            "peak_bytes": made.room.peak_bytes,
            "threads": made.room.threads,
            "problems": made.problems,
        })  # fmt: skip
        return 2 if made.problems else 0
    rows = [
        (name, len(plan.keys), size(plan.write_bytes), "; ".join(c.description for c in plan.coverage))
        for name, plan in made.plans.items()
    ]
    table("Variants", ("folder", "tensors", "size", "what"), rows, right=(1, 2))
    say(f"writes:   {size(made.write_bytes)} in {len(made.plans)} folders in {made.out}")
    say(f"reads:    {size(made.read_bytes)} for all of them together")
    say(_memory(made.room))
    for note in dict.fromkeys(note for plan in made.plans.values() for note in plan.warnings):
        say(f"note:     {note}")
    _problems(made.problems)
    return 2 if made.problems else 0


def _facts(made: Plan) -> dict[str, Any]:
    return {
        "inputs": made.inputs,
        "output": {**_output(made), "bytes": made.write_bytes, "result": made.result},
        "coverage": made.coverage,
        "tasks": len(made.tasks),
        "passes": made.passes,
        "read_bytes": made.read_bytes,
        "write_bytes": made.write_bytes,
        "peak_bytes": made.room.peak_bytes,
        "seconds": made.seconds,
        "free_bytes": made.free_bytes,
        "threads": made.room.threads,
        "device": made.device or "cpu",
        "warnings": made.warnings,
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
    if made.result:
        say(f"result:   {'; '.join(text for text in made.result.values() if text)}")
    often = f", the inputs {made.readings:.1f} times" if made.readings > 1.05 else ""
    say(f"reads:    {size(made.read_bytes)}{often}")
    say(_memory(made.room))
    if (fit := made.fit) is not None:
        say(
            f"devices:  {', '.join(fit.devices)}; {size(fit.device_bytes)} of each at most, in {fit.lanes} "
            f"lane{'s' if fit.lanes != 1 else ''}"
        )
    time = "not known: a method declares no cost"
    if made.seconds is not None:
        time = f"about {roughly(made.seconds)} on one core of a server (AMD EPYC; rough, without downloads)"
    say(f"time:     {time}")
    if made.free_bytes is not None:
        say(f"disk:     {size(made.free_bytes)} free")
    for note in made.warnings:
        say(f"note:     {note}")
    _problems(made.problems)


def _memory(room: Room) -> str:
    return f"memory:   {size(room.peak_bytes)} at most, with {room.threads} thread{'s' if room.threads != 1 else ''}"


def _problems(problems: Sequence[Problem]) -> None:
    if problems:
        say(f"\n{len(problems)} problem{'s' if len(problems) != 1 else ''}:")
        for problem in problems:
            say(f"  - {problem}")
