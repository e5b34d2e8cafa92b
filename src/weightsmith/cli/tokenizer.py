"""`weightsmith tokenizer`."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from weightsmith.cli.options import DEFAULTS, Json, Out, Quiet, Run
from weightsmith.cli.show import progress_bar, say
from weightsmith.cli.shown.result import summary
from weightsmith.cli.words import Parameter, Verbs

__all__ = ["tokenizer", "transplant"]

Method = Literal["omp", "common_interpolation", "subword", "mean", "zero", "randn", "john_hewitt", "landmark_pca",
                 "stb", "mp_rope"]  # fmt: skip
How = Literal["distance_proportional", "barycentric", "least_squares"]
Pieces = Literal["mean", "sum", "weighted_mean", "first_last"]
Where = Literal["no", "embed", "lm_head", "yes"]
shown = partial(Parameter, show_default=True)


def transplant(
    model: Annotated[str, Parameter(help="Model to move: a folder or a hub id.")],
    donor: Annotated[str, Parameter(help="Model whose tokenizer it gets.")],
    out: Out,
    /,
    *,
    method: Annotated[Method, shown(help="How rows of new tokens are made.")] = "omp",
    k: Annotated[int, shown(help="Shared tokens that each new row is made of.")] = 64,
    metric: Annotated[Literal["euclidean", "cosine"], shown(help="common_interpolation: what is near.")] = "euclidean",
    weights: Annotated[How, shown(help="common_interpolation: how near tokens are weighed.")] = "distance_proportional",
    subword: Annotated[Pieces, shown(help="subword: how rows of pieces are combined.")] = "mean",
    prefix_match: Annotated[Where, Parameter(help="Take rows of known beginnings of tokens, and where.")] = "no",
    byte_match: Annotated[Where, Parameter(help="Take rows of byte tokens for letters, and where.")] = "no",
    magikarp: Annotated[bool, Parameter(help="Leave under-trained tokens out of what new rows are made of.")] = False,
    batch_size: Annotated[int, shown(help="Rows computed together.")] = 512,
    noise: Annotated[float, Parameter(help="Standard deviation of noise on new rows.")] = 0.0,
    scale: Annotated[float, Parameter(help="Factor on new rows.")] = 1.0,
    pad_to_multiple_of: Annotated[int, Parameter(help="Round the number of rows up.")] = 1,
    seed: Annotated[int, Parameter(help="Of every random choice.")] = 0,
    settings: Run = DEFAULTS,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give a model the tokenizer of another: rows of shared tokens stay, those of new ones are approximated."""
    from weightsmith.jobs.transplant import transplant as run
    from weightsmith.tokens.transplant import Transplant

    how = Transplant(method, k, metric, weights, subword, prefix_match, byte_match, magikarp, batch=batch_size,
                     noise=noise, scale=scale, multiple=pad_to_multiple_of, seed=seed)  # fmt: skip
    with progress_bar("transplanting", quiet=quiet or json) as progress:
        result, tokens = run(model, donor, out, how, settings, progress=progress)
    if not (quiet or json):
        say(f"{tokens.kept} tokens keep their rows, {tokens.new} are new (by {method})")
    summary(result, json=json, quiet=quiet, next_step=f'"weightsmith check {out}" sees whether it works')


tokenizer = Verbs("Move a model to another tokenizer.", (transplant,))
