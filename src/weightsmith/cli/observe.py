"""`weightsmith observe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from weightsmith.cli.options import Device, Json, Overwrite, Quiet, chosen
from weightsmith.cli.show import progress_bar, say, show_json
from weightsmith.cli.words import Parameter

__all__ = ["observe"]


def observe(
    model: Annotated[str, Parameter(help="Model folder or hub id[@revision].")],
    /,
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"], help="Folder for the statistics.")],
    data: Annotated[Path | None, Parameter(help=".txt, .jsonl, .npz, or a folder of texts or images.")] = None,
    stat: Annotated[str, Parameter(help="Statistics, separated by commas: gram, fisher, routing, routed.")] = "",
    optimizer: Annotated[Path | None, Parameter(help="Optimizer's state in place of data: second moments.")] = None,
    rank: Annotated[
        int | None, Parameter(help="Keep second moments as products of this rank; 1: row and column sums.")
    ] = None,
    examples: Annotated[int, Parameter(help="How many examples to use.", show_default=True)] = 256,
    batch: Annotated[int, Parameter(help="Examples per forward pass.", show_default=True)] = 8,
    length: Annotated[int, Parameter(help="Tokens per example.", show_default=True)] = 512,
    kind: Annotated[
        str, Parameter(help="causal-lm, encoder, ...; auto: as config.json says.", show_default=True)
    ] = "auto",
    fisher: Annotated[
        Literal["auto", "exact", "sampled", "empirical"], Parameter(help="How labels are taken.")
    ] = "auto",
    seed: Annotated[int, Parameter(help="Of the choice of examples and sampled labels.", show_default=True)] = 0,
    field: Annotated[str | None, Parameter(help="Which field of a .jsonl or .npz to read.")] = None,
    skip_first: Annotated[bool, Parameter(help="Leave out the first token of each text (gram).")] = False,
    layers: Annotated[tuple[int, int] | None, Parameter(help="Blocks START END only.")] = None,
    stream: Annotated[bool, Parameter(help="Load one block at a time, activations on disk (routing, routed).")] = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: Annotated[bool, Parameter(help="Let the checkpoint's own python code run.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Collect statistics of a model, once, for methods that need them (regmean, fisher, ota, ffg, moe shrink)."""
    from weightsmith.observe import collect

    names = collect.asked(stat, data, optimizer)
    with progress_bar("observing", quiet=quiet or json, nbytes=False) as progress:
        collect.observe(
            model, data, names, out, examples=examples, batch=batch, length=length, kind=kind, fisher=fisher, seed=seed,
            field=field, skip_first=skip_first, layers=layers, stream=stream, device=chosen(device=device).device,
            overwrite=overwrite, trust_remote_code=trust_remote_code, optimizer=optimizer, rank=rank,
            progress=None if progress is None else lambda _, done, total: progress(done, total),
        )  # fmt: skip
    if json:
        show_json({"out": out, "statistics": names})
    elif not quiet:
        say("\n".join(collect.said(model, out, names)))
