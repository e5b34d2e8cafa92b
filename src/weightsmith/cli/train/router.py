"""`weightsmith train router`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Device, Json, Out, Overwrite, Quiet, chosen
from weightsmith.cli.show import duration, progress_bar, say, show_json, table
from weightsmith.cli.words import Parameter

__all__ = ["router"]


def router(
    twins: Annotated[Path, Parameter(help="Folder that compress made with twin (strategy svd).")],
    out: Out,
    /,
    *,
    data: Annotated[
        tuple[str, ...], Parameter(help="Samples of an expert, as math=math.jsonl; once for each expert.")
    ] = (),
    base: Annotated[Path | None, Parameter(help="Where the base is now, if not where it was.")] = None,
    steps: Annotated[int, Parameter(help="Steps of the optimizer.", show_default=True)] = 500,
    examples: Annotated[int, Parameter(help="At most so many samples of each expert.", show_default=True)] = 3000,
    length: Annotated[int, Parameter(help="Tokens of a sample.", show_default=True)] = 256,
    field: Annotated[str | None, Parameter(help="Which field of a .jsonl or .npz to read.")] = None,
    hidden: Annotated[int, Parameter(help="Width of the router.", show_default=True)] = 1024,
    valid: Annotated[float, Parameter(help="Share of the samples held out and measured.", show_default=True)] = 0.1,
    seed: Annotated[int, Parameter(help="Of the choice, the order, and the first weights.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train what says, of an input, which experts of a compressed folder it wants."""
    from weightsmith.runtime.routed import Routed
    from weightsmith.runtime.router import named_files, train_router

    files = named_files(data)
    settings = chosen(overwrite=overwrite, files=(*files.values(), twins))
    model = Routed.load(twins, base=base, device=chosen(device=device).device)
    found = model.examples(files, examples=examples, length=length, seed=seed, field=field)
    with progress_bar("training", quiet=quiet or json, nbytes=False) as progress:
        result = train_router(
            model, found, out, settings.but(progress=progress), steps=steps, hidden=hidden, valid=valid, seed=seed
        )
    if json:
        show_json(result)
    elif not quiet:
        rows = [(name, f"{share:.1%}") for name, share in result.accuracy.items()]
        table("Held-out samples that the router gives to their expert", ["expert", "share"], rows, right=(1,))
        say(f"trained on {result.examples} samples; {result.valid} were held out")
        say(f"wrote {result.out} in {duration(result.seconds)}; Routed.load(TWINS, router=OUT) uses it")
