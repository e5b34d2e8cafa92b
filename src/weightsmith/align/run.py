"""`align`: find the permutation that brings one model's units into another's order, and write it as index vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from weightsmith.align.chosen import matchable
from weightsmith.align.folder import write
from weightsmith.align.layout import Layout
from weightsmith.align.match import STATISTICS, match, objective, profits, walk
from weightsmith.align.partial import Split, split, wide_groups
from weightsmith.align.proof import proved
from weightsmith.align.spectrum import alignment
from weightsmith.core.errors import PlanError, RecipeError
from weightsmith.core.lazy import torch
from weightsmith.core.symmetry import Orders, identity, indices, permute
from weightsmith.io.read.aligned import ReorderedSource
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.io.read.widened import Halves, WidenedSource
from weightsmith.io.write.output import check_output

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.align.data import Pair
    from weightsmith.align.fit import Fitted

__all__ = ["Aligned", "Settings", "align", "entries", "matched", "moves", "opened", "symmetries"]

By = Literal["weights", "activations", "ste"]
_COUNTS = ("restarts", "max_iter", "examples", "length", "batch", "epochs")


@dataclass(frozen=True)
class Settings:
    """How to match: see `match.match`.

    freeze  groups or kinds of groups; None asks whether the models are related
    by      weights, activations (one assignment each), or ste (learned with gradients); the last two run both models on
            `data`: so many `examples` of `length` tokens, in forward passes of `batch`; ste `epochs` times at rate `lr`
    keep    share of the hidden units of MLPs that stay separate, 0 to 1: the merge is partial, and wider (PLeaS)
    budget  instead: operations per operation of one model, which decide the share
    """

    freeze: tuple[str, ...] | None = None
    restarts: int = 1
    max_iter: int = 100
    seed: int = 0
    normalize: bool = False
    spectra: bool = False
    keep: float | None = None
    budget: float | None = None
    by: By = "weights"
    data: str | None = None
    examples: int = 64
    length: int = 256
    batch: int = 8
    epochs: int = 1
    lr: float = 1e-2

    def __post_init__(self) -> None:
        for name, value in ((name, getattr(self, name)) for name in _COUNTS):
            if value < 1:
                raise RecipeError(f"{name} = {value} is outside [1, inf)")
        if self.by not in get_args(By):
            raise RecipeError(f"by = {self.by!r} is none of {', '.join(get_args(By))}")
        if (self.by != "weights") > (self.data is not None):
            raise RecipeError(f"--by {self.by} needs data; give --data")
        if self.data is not None and self.by == "weights" and self.keep is None and self.budget is None:
            raise RecipeError("data are for --by activations, --by ste and partial merges; leave them out")
        if not self.lr > 0:
            raise RecipeError(f"lr = {self.lr:g} is not above 0")
        if self.keep is not None and self.budget is not None:
            raise RecipeError("give a share to keep or a budget, not both")
        if self.keep is not None and not 0 <= self.keep <= 1:
            raise RecipeError(f"keep = {self.keep:g} is outside [0, 1]")


@dataclass(frozen=True)
class Aligned:
    """What was found.

    orders     of every group, see `core.symmetry.Orders`
    moved      of every group, how many units are not where they were, of how many
    before, after  the objective sum_t <A_t, pi(B_t)> over the tensors that the groups move
    distance   ||A - pi(B)|| over the same, before and after
    splits     of a partial merge: group -> which of its units become one;  fit: its layers by least squares, on data
    spectrum   with `spectra`: tensor -> alignment of singular vectors before and after, see `spectrum.alignment`
    """

    layout: Layout
    orders: Orders
    moved: Mapping[str, tuple[int, int]]
    before: float
    after: float
    distance: tuple[float, float]
    spectrum: Mapping[str, tuple[float, float]]
    seconds: float
    splits: Mapping[str, Split] = field(default_factory=dict)
    fit: Fitted | None = None

    @property
    def aligned(self) -> bool:
        """Whether the models lay so before: nothing moves."""
        return not any(count for count, _ in self.moved.values())


def moves(orders: Orders) -> dict[str, tuple[int, int]]:
    """Of every group, how many units are not where they were, of how many."""
    return {name: (int((o != np.arange(o.shape[-1])).sum()), o.size) for name, o in orders.items()}


def symmetries(model: Any) -> Layout:
    """What may be permuted in a model, proved, and what is frozen and why; see `align.proof`."""
    return proved(opened(model))


def opened(model: Any) -> Source:
    """A model that may be a source already."""
    return model if isinstance(model, Source) else open_source(model)


def align(
    moving: Any,
    reference: Any,
    out: str | Path,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Aligned:
    """Permute the units of `moving` onto those of `reference` and write the permutation to the folder `out`.

    Models are what `open_source` takes.  Groups that have no tensor in common are matched one after the other, so that
    with a frozen residual stream no more than one layer of both models is held at a time.  The folder holds
    permutations.safetensors and weightsmith.json; recipes name it as `align` of the model.
    Errors: one line, before anything is written; SourceError for models that do not fit together.
    """
    sources = (opened(moving), opened(reference))
    out = Path(out)
    read = [path for source in sources for path in source.origin.locations]
    if problems := check_output(out, read, overwrite, True, 0):
        raise PlanError(problems)
    for source in sources:
        source.prepare()
    settings = settings or Settings()
    found = matched(sources[0], sources[1], settings, progress)
    write(out, found, sources, asdict(settings), overwrite)
    return found


def matched(
    moving: Source,
    reference: Source,
    settings: Settings,
    progress: Callable[[int, int], object] | None = None,
) -> Aligned:
    """The permutation alone, nothing written."""
    began = time.perf_counter()
    moving, reference = packed_like_memory(moving), packed_like_memory(reference)
    movable = matchable(moving, reference, settings.freeze)
    orders: dict[str, np.ndarray] = {}
    spectrum: dict[str, tuple[float, float]] = {}
    total, squares = np.zeros(2), 0.0
    wider = wide_groups(moving, movable, settings.keep, settings.budget)
    splits: dict[str, Split] = {}
    pair = _pair(reference, moving, settings)
    given = _from_data(pair, moving, movable, settings)
    parts = list(walk(movable.groups))
    for done, groups in enumerate(parts):
        names = dict.fromkeys(name for group in groups for name in group.names)
        a, b = ({name: entries(source, name) for name in names} for source in (reference, moving))
        here: Orders
        if given is None:
            here = match(
                groups, a, b, seed=settings.seed, restarts=settings.restarts, max_iter=settings.max_iter,
                normalize=settings.normalize,
            ).orders  # fmt: skip
        else:
            here = {name: given[name] for group in groups for name in identity(group)}
        orders |= here
        counted = [n for n in names if n.rpartition(".")[2] not in STATISTICS]
        squares += objective(a, a, counted) + objective(b, b, counted)
        total[0] += objective(a, b, counted)
        if settings.spectra:
            spectrum |= {n: (alignment(a[n], b[n]), 0.0) for n in a if a[n].ndim == 2}
        for group in groups:
            if group.name in wider:
                profit = profits(group, a, b, here, groups)
                splits[group.name] = split(profit, here[group.name], wider[group.name])
        for group in groups:
            b |= permute(b, group, here)
        total[1] += objective(a, b, counted)
        spectrum |= {n: (first, alignment(a[n], b[n])) for n, (first, _) in spectrum.items() if n in b}
        if progress:
            progress(done + 1, len(parts))
    before, after = (float(np.sqrt(max(squares - 2 * value, 0.0))) for value in total)
    seconds = time.perf_counter() - began
    fit = _fit(pair, moving, reference, movable, orders, splits) if pair is not None and splits else None
    return Aligned(
        movable,
        orders,
        moves(orders),
        float(total[0]),
        float(total[1]),
        (before, after),
        spectrum,
        seconds,
        splits,
        fit,
    )


def _pair(reference: Source, moving: Source, settings: Settings) -> Pair | None:
    """Both models ready to run, where there are data to run them on."""
    if settings.data is None:
        return None
    from weightsmith.align.data import loaded_pair  # runs models: long to import

    return loaded_pair(
        reference, moving, settings.data, examples=settings.examples, length=settings.length, batch=settings.batch
    )


def _fit(
    pair: Pair, moving: Source, reference: Source, movable: Layout, orders: Orders, splits: Mapping[str, Split]
) -> Fitted:
    """Least squares for the layers of the wider model, from the mean that it would be without."""
    from weightsmith.align.fit import fitted

    halves = [Halves(g, splits[g.name].merged, splits[g.name].separate) for g in movable.groups if g.name in splits]
    plain = [group for group in movable.groups if group.name not in splits]
    places = indices(plain, orders, {name: key.shape for name, key in moving.keys.items()})
    both = (WidenedSource(reference, halves, 0), WidenedSource(ReorderedSource(moving, places), halves, 1))
    start = {
        name: (entries(both[0], name) + entries(both[1], name)) / 2
        for name in both[0].keys
        if both[0].keys[name].floating
    }
    return fitted(reference, start, orders, movable.groups, splits, pair)


def _from_data(pair: Pair | None, moving: Source, movable: Layout, settings: Settings) -> Orders | None:
    """The orders of all groups where data decide them; None where weights do."""
    if settings.by == "weights" or pair is None:
        return None
    from weightsmith.align.data import by_activations, learned

    if settings.by == "activations":
        return by_activations(moving, movable.groups, pair)
    found = learned(movable.groups, pair, epochs=settings.epochs, lr=settings.lr, seed=settings.seed)
    return {**{n: o for group in movable.groups for n, o in identity(group).items()}, **found}


def entries(source: Source, name: str) -> Tensor:
    """A tensor to match by: float32, and float64 of float64."""
    tensor = source.read(name)
    return tensor if tensor.dtype == torch.float64 else tensor.float()
