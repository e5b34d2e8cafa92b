"""`weightsmith lora`: adapters as adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from weightsmith.cli.options import Json, Overwrite, Quiet, RecipeFile, Sets
from weightsmith.cli.show import duration, progress_bar, say, show_json, size, table, warn
from weightsmith.cli.words import Parameter, Verbs
from weightsmith.core.errors import some

if TYPE_CHECKING:
    from weightsmith.lora import Written

__all__ = ["lora"]

Out = Annotated[
    Path,
    Parameter(help="PEFT folder to write.  It appears complete or not at all; an interrupted run begins anew."),
]
DType = Annotated[str | None, Parameter(help="Of the stored factors, as float32; default: as the inputs store theirs.")]
Energy = Annotated[
    float | None, Parameter(help="Per module the smallest rank that keeps this share of the squared singular values.")
]


def merge(
    recipe: RecipeFile,
    out: Out,
    /,
    *,
    set_: Sets = (),
    force: Annotated[bool, Parameter(help="Also combine adapters that name different bases.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Combine adapters into one: cat, svd, linear, ties, dare_*, magnitude_prune, *_svd, knots, mwa, average."""
    from weightsmith.lora import load, run

    made = load(recipe, set_)
    with progress_bar("combining", quiet=quiet or json, nbytes=False) as progress:
        result = run(made, out, force=force, overwrite=overwrite, progress=progress)
    _show(result, json=json, quiet=quiet)


def extract(
    model: Annotated[Path, Parameter(help="The fine-tuned model.")],
    out: Out,
    /,
    *,
    base: Annotated[Path, Parameter(help="The model that it was fine-tuned from.")],
    rank: Annotated[int | None, Parameter(help="Rank of every module, at most.")] = None,
    energy: Energy = None,
    max_rank: Annotated[int, Parameter(help="Largest rank that an energy may ask for.", show_default=True)] = 128,
    epsilon: Annotated[float, Parameter(help="Leave out singular values up to this.")] = 0.0,
    uniform: Annotated[bool, Parameter(help="One rank for all modules, for programs without rank_pattern.")] = False,
    whole_embeddings: Annotated[bool, Parameter(help="Changed embeddings in full, instead of as LoRA.")] = False,
    skip: Annotated[bool, Parameter(help="Leave out changes that are no matrices (norms, biases).")] = False,
    include: Annotated[tuple[str, ...], Parameter(help="Only tensors that this glob matches; may be repeated.")] = (),
    exclude: Annotated[tuple[str, ...], Parameter(help="No tensors that this glob matches; may be repeated.")] = (),
    dtype: DType = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Get a LoRA adapter out of a fine-tuned model; says how much of each change it keeps."""
    from weightsmith.lora import extract as run

    with progress_bar("extracting", quiet=quiet or json, nbytes=False) as progress:
        result = run(
            str(model),
            str(base),
            out,
            rank=rank,
            energy=energy,
            max_rank=max_rank,
            epsilon=epsilon,
            uniform=uniform,
            whole_embeddings=whole_embeddings,
            skip=skip,
            include=include,
            exclude=exclude,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )
    _show(result, json=json, quiet=quiet)


def average(
    run: Annotated[Path, Parameter(help="Output folder of a training run, with folders checkpoint-N in it.")],
    out: Out,
    /,
    *,
    last: Annotated[int, Parameter(help="How many checkpoints, counted from the end.", show_default=True)] = 5,
    every: Annotated[int | None, Parameter(help="Of these every N-th.")] = None,
    steps: Annotated[tuple[int, int] | None, Parameter(help="First and last step.")] = None,
    metric: Annotated[Literal["loss", "steps"], Parameter(help="What the weights follow.", show_default=True)] = "loss",
    penalty: Annotated[float, Parameter(help="How strongly: 0 is the plain average.", show_default=True)] = 1.0,
    rule: Annotated[Literal["power", "softmax", "rank"], Parameter(help="From loss to weight.")] = "power",
    source: Annotated[Literal["train", "eval"], Parameter(help="Which logged loss.", show_default=True)] = "train",
    smooth: Annotated[
        Literal["nearest", "since"], Parameter(help="The last logged loss, or the mean since the checkpoint before.")
    ] = "nearest",
    space: Annotated[
        Literal["factors", "product"], Parameter(help="Average A and B (one run), or their products.")
    ] = "factors",
    dtype: DType = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Average the adapter checkpoints of one training run, weighted by the loss that the trainer logged."""
    from weightsmith.lora import average as combine

    result = combine(
        run,
        out,
        last=last,
        every=every,
        steps=steps,
        dtype=dtype,
        overwrite=overwrite,
        metric=metric,
        penalty=penalty,
        rule=rule,
        source=source,
        smooth=smooth,
        space=space,
    )
    _show(result, json=json, quiet=quiet)


def resize(
    adapter: Annotated[Path, Parameter(help="PEFT folder.")],
    out: Out,
    /,
    *,
    rank: Annotated[int | None, Parameter(help="Rank of every module, at most.")] = None,
    energy: Energy = None,
    dtype: DType = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Lower the rank of an adapter, with the smallest possible error."""
    from weightsmith.lora import resize as run

    _show(run(adapter, out, rank=rank, energy=energy, dtype=dtype, overwrite=overwrite), json=json, quiet=quiet)


def _show(result: Written, *, json: bool, quiet: bool) -> None:
    if json:
        show_json(result)
        return
    for text in result.warnings:
        warn(text)
    if quiet:
        return
    if len(set(result.weights.values())) > 1:
        table("weights", ("adapter", "weight"), [(n, f"{w:.4g}") for n, w in result.weights.items()], right=(1,))
    worst = sorted(result.modules, key=lambda module: -module.error)[:10]
    rows = [(m.name, m.rank, f"{m.energy:.2%}", f"{m.error:.2%}") for m in worst]
    if result.worst >= 1e-3:
        table("modules with the largest errors", ("module", "rank", "energy kept", "error"), rows, right=(1, 2, 3))
    say(
        f"wrote {result.out}: {len(result.modules)} modules of rank up to {result.rank}, {size(result.nbytes)}, "
        f"{duration(result.seconds)}; largest error of a module {result.worst:.2g}"
    )
    if result.sizes:
        largest = sorted(result.sizes.items(), key=lambda item: -item[1])
        shown = [f"{name.removeprefix('base_model.model.')} ({size(nbytes)})" for name, nbytes in largest]
        say(f"kept in full, {size(sum(result.sizes.values()))}: {some(shown, 5)}")
    if result.tried:
        say(result.tried)
    say(f'next: peft.PeftModel.from_pretrained(model, "{result.out}")')


lora = Verbs(
    "Combine LoRA adapters, average a run's, make them smaller, or get them out of models.",
    (merge, extract, average, resize),
)
