"""`weightsmith moe shrink`."""

from __future__ import annotations

from typing import Annotated, Literal

from weightsmith.cli.options import DEFAULTS, Json, Out, Quiet, Run
from weightsmith.cli.show import progress_bar, say
from weightsmith.cli.shown.result import summary
from weightsmith.cli.words import Parameter

__all__ = ["shrink"]


def shrink(
    model: Annotated[str, Parameter(help="Folder of a mixture of experts, or hub id[@revision].")],
    out: Out,
    /,
    *,
    stats: Annotated[tuple[str, ...], Parameter(help="Folder that observe --stat routing wrote; may be repeated.")],
    by: Annotated[str, Parameter(help="reap, m_smoe, mc_smoe, sub_moe, hc_smoe or ream.", show_default=True)] = "reap",
    experts: Annotated[int | None, Parameter(help="How many experts each layer keeps.")] = None,
    keep: Annotated[float | None, Parameter(help="Or which share of them, as 0.75.")] = None,
    budget: Annotated[
        Literal["layer", "global"], Parameter(help="As many in each layer, or on average.", show_default=True)
    ] = "layer",
    skip_align: Annotated[bool, Parameter(help="Average without putting hidden units into one order.")] = False,
    rank: Annotated[int | None, Parameter(help="Project merged matrices on so many directions of their group.")] = None,
    whiten: Annotated[bool, Parameter(help="Count those directions by inputs (needs the statistic routed).")] = False,
    ratio: Annotated[float | None, Parameter(help="Of mc_smoe: share of numbers in low-rank factors (0.15).")] = None,
    rows: Annotated[float | None, Parameter(help="Of mc_smoe: share of rows kept beside them (0.1).")] = None,
    mtp: Annotated[
        Literal["refuse", "drop"], Parameter(help="Blocks that predict further tokens.", show_default=True)
    ] = "refuse",
    dry_run: Annotated[bool, Parameter(help="Show what would be written, and stop.")] = False,
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give a mixture fewer experts: leave out the least important ones, or merge those that are alike."""
    from weightsmith.cli.shown.mixture import fewer, next_of, preview_fewer
    from weightsmith.experts.shrink import shrink as run
    from weightsmith.experts.smaller import Shrinking, smaller

    found = smaller(Shrinking(model, stats, by, experts, keep, budget, not skip_align, rank, whiten, mtp, ratio, rows))
    if dry_run:
        return preview_fewer(found, json)
    if not json and not quiet:
        say(fewer(found))
    with progress_bar("shrinking", quiet=quiet or json) as progress:
        result = run(found, out, settings, progress=progress)
    summary(result, json=json, quiet=quiet, next_step=next_of(found, out))
