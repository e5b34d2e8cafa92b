"""`weightsmith heads`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from weightsmith.cli.options import Json
from weightsmith.cli.show import show_json, table
from weightsmith.cli.words import Parameter
from weightsmith.core.errors import RecipeError

__all__ = ["heads"]


def heads(
    model: Annotated[Path, Parameter(help="Decoder whose heads are looked at.")],
    /,
    *,
    kind: Annotated[Literal["q", "k", "v"], Parameter(help="What the later head reads for.", show_default=True)] = "q",
    target: Annotated[
        tuple[str, ...], Parameter(help="Later head as LAYER.HEAD; may be repeated.  Default: all.")
    ] = (),
    distance: Annotated[
        tuple[float, ...], Parameter(help="Tokens from query to key; repeated: the mean of them.")
    ] = (),
    top: Annotated[int, Parameter(help="How many channels to print.", show_default=True)] = 20,
    fold: Annotated[bool, Parameter(help="Fold norms into what reads.", show_default=True)] = True,
    html: Annotated[Path | None, Parameter(help="Page with the scores of all pairs to write.")] = None,
    json: Json = False,
) -> None:
    """Find channels between attention heads from weights alone: components that a later head reads far above chance."""
    from weightsmith.align.composition import as_page, composition
    from weightsmith.io.disk import write_file
    from weightsmith.io.read.open import open_source

    wanted = [re.fullmatch(r"(\d+)\.(\d+)", word) for word in target]
    if None in wanted:
        raise RecipeError(f"{target[wanted.index(None)]!r} is no head; write LAYER.HEAD, as 9.6")
    chosen = [(int(found[1]), int(found[2])) for found in wanted if found]
    found = composition(open_source(model), kind, fold=fold, targets=chosen or None, distances=distance or (0,))
    if html is not None:
        write_file(html, as_page(str(model), found))
    shown = found.channels[:top]
    if json:
        show_json(
            {"baseline": found.baseline, "heads": found.names, "channels": shown, "matrix": found.matrix.tolist()}
        )
    else:
        rows = [
            (f"{c.layer}.{c.head}.{c.component}", f"{c.to_layer}.{c.to_head}", f"{c.score:.3f}", f"{c.z:.1f}")
            for c in shown
        ]
        table(
            f"{kind}-composition, above {found.baseline:.3f} by chance", ("writes", "reads", "score", "z"), rows, (2, 3)
        )
