"""Results of runs that write a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightsmith.cli.show import duration, files_in, say, show_json, size, table, warn
from weightsmith.core.problem import Code, Problem, told

if TYPE_CHECKING:
    from weightsmith.jobs.job import Result, Storage
    from weightsmith.jobs.sweep import SweepResult

__all__ = ["summary", "summary_of_all"]


def summary_of_all(swept: SweepResult, *, json: bool, quiet: bool) -> None:
    """Say what a sweep has made, a line for each variant."""
    from weightsmith.observe.consistency import cheap_check

    warnings = {
        name: (*found.warnings, *told(Code.CHECK, cheap_check(found.out))) for name, found in swept.variants.items()
    }
    if json:
        made = {name: files_in(found.out) for name, found in swept.variants.items()}
        show_json({
            "out": swept.out,
            "variants": {
                name: {"out": found.out, "files": made[name][0], "bytes": made[name][1], "warnings": warnings[name]}
                for name, found in swept.variants.items()
            },
            "seconds": round(swept.seconds, 3),
            "read_bytes": swept.read_bytes,
            "write_bytes": swept.write_bytes,
            "peak_bytes": swept.peak_bytes,
        })  # fmt: skip
        return
    texts: dict[Problem, list[str]] = {}
    for name, said in warnings.items():
        for text in said:
            texts.setdefault(text, []).append(name)
    for text, names in texts.items():
        warn(text if len(names) == len(warnings) else text.of(", ".join(names)))
    if quiet:
        return
    for found in swept.variants.values():
        files, nbytes = files_in(found.out)
        say(f"wrote {found.out}: {size(nbytes)} in {files} file{'s' if files != 1 else ''}")
    read = f"{size(swept.read_bytes)} read for all of them together"
    say(f"{len(swept.variants)} variants in {duration(swept.seconds)}; {read}")
    say(f'next: "weightsmith check {next(iter(swept.variants.values())).out}" sees whether the first one works')


def summary(result: Result, *, json: bool, quiet: bool, next_step: str) -> None:
    """Say what a run has made: where, how large, how fast, and what to do next."""
    files, nbytes = files_in(result.out)
    # What an earlier run has done would count for this one's time.
    rate = (result.read_bytes + result.write_bytes) / max(result.seconds, 1e-9)
    if json:
        show_json({
            "out": result.out,
            "files": files,
            "bytes": nbytes,
            "seconds": round(result.seconds, 3),
            "read_bytes": result.read_bytes,
            "write_bytes": result.write_bytes,
            "bytes_per_second": None if result.complete or result.resumed else round(rate),
            "complete": result.complete,
            "peak_bytes": result.peak_bytes,
            "storage": result.storage,
            **({} if result.lost is None else {"lost": result.lost}),
            "warnings": result.warnings,
        })  # fmt: skip
        return
    for text in result.warnings:
        warn(text)
    if not quiet:
        count = "1 file" if files == 1 else f"{files} files"
        speed = "" if result.resumed else f", {size(rate)}/s in and out"
        if result.complete:
            say(f"{result.out} is already complete: {size(nbytes)} in {count}")
        else:
            say(f"wrote {result.out}: {size(nbytes)} in {count}, {duration(result.seconds)}{speed}")
        if result.lost is not None:
            say(f"compression lost {result.lost:.2%} of it (relative norm of its change, or of all without a base)")
        if (kept := result.storage) is not None:
            beside = f" beside the base's {size(kept.base)}" if kept.base else ""
            who, taken = ("1 model", "it takes") if kept.count == 1 else (f"{kept.count} models", "they take")
            say(
                f"{who} in {size(kept.stored)}{beside}: "
                f"{kept.ratio:.0%} of the {size(kept.experts)} that {taken} in full"
            )
            _losses(kept)
        say(f"next: {next_step}")


def _losses(kept: Storage) -> None:
    """What comes back of every model."""
    of = "of its change; the bare base: 100%" if kept.base else "of its weights"
    rows = [
        (name, f"{lost:.2%}", f"{kept.worst[name][1]:.2%}", kept.worst[name][0]) for name, lost in kept.error.items()
    ]
    table(f"what each model loses, {of} (relative norm)", ["model", "in all", "at worst", "in"], rows, right=(1, 2))
