"""Plans."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from weightsmith.cli.show import roughly, say, size, table
from weightsmith.core.problem import Problem

if TYPE_CHECKING:
    from weightsmith.jobs.sweep import Sweep
    from weightsmith.plan.plan import Plan
    from weightsmith.plan.room import Room

__all__ = ["facts", "facts_of_all", "show", "show_all"]


def facts(made: Plan) -> dict[str, Any]:
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


def show(made: Plan) -> None:
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
    _said(made.warnings, made.problems)


def _memory(room: Room) -> str:
    return f"memory:   {size(room.peak_bytes)} at most, with {room.threads} thread{'s' if room.threads != 1 else ''}"


def _said(warnings: Iterable[Problem], problems: tuple[Problem, ...]) -> None:
    for warning in dict.fromkeys(warnings):
        say(f"{f'{warning.kind}:':<9} {warning}")
    if problems:
        say(f"\n{len(problems)} problem{'s' if len(problems) != 1 else ''}:")
        for problem in problems:
            say(f"  - {problem}")


def facts_of_all(made: Sweep) -> dict[str, Any]:
    """Of all variants of a sweep."""
    return {
        "out": made.out,
        "variants": {name: facts(plan) for name, plan in made.plans.items()},
        "read_bytes": made.read_bytes,
        "write_bytes": made.write_bytes,
        "peak_bytes": made.room.peak_bytes,
        "threads": made.room.threads,
        "problems": made.problems,
    }


def show_all(made: Sweep) -> None:
    rows = [
        (name, len(plan.keys), size(plan.write_bytes), "; ".join(c.description for c in plan.coverage))
        for name, plan in made.plans.items()
    ]
    table("Variants", ("folder", "tensors", "size", "what"), rows, right=(1, 2))
    say(f"writes:   {size(made.write_bytes)} in {len(made.plans)} folders in {made.out}")
    say(f"reads:    {size(made.read_bytes)} for all of them together")
    say(_memory(made.room))
    _said([warning for plan in made.plans.values() for warning in plan.warnings], made.problems)
