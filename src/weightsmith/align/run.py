"""`align`: find the permutation that brings one model's units into another's order, and write it as index vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import xxhash

from weightsmith import __version__
from weightsmith.align.layout import RESIDUAL, Layout, layout
from weightsmith.align.match import STATISTICS, match, objective, profits, walk
from weightsmith.align.partial import Split, split, wide_groups
from weightsmith.align.proof import proved
from weightsmith.align.spectrum import alignment
from weightsmith.core.errors import PlanError, RecipeError, SourceError, did_you_mean, some
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.symmetry import Orders, identity, indices, permute
from weightsmith.io.package.manifest import build_manifest, write_manifest
from weightsmith.io.read.aligned import FITTED, KIND, ORDERS, ReorderedSource, group_json, identified
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source, tensor_to_bits
from weightsmith.io.read.widened import Halves, WidenedSource
from weightsmith.io.write.output import FolderSink, check_output

if TYPE_CHECKING:
    from torch import Tensor

    from weightsmith.align.data import Pair
    from weightsmith.align.fit import Fitted

__all__ = ["NOTHING", "Aligned", "Settings", "align", "matched", "symmetries"]

NOTHING = "nothing"
"""Given as the only name to freeze: also the residual stream moves, whatever the models have in common."""

By = Literal["weights", "activations", "ste"]
_COUNTS = ("restarts", "max_iter", "examples", "length", "batch", "epochs")
_LOOKED_AT = 1 << 22  # entries of the embedding that tell whether two models come from one
_RELATED = 0.5  # their cosine from which on they do: independent models are near 0, fine-tunes above 0.99


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


def symmetries(model: Any) -> Layout:
    """What may be permuted in a model, proved, and what is frozen and why; see `align.proof`."""
    return proved(_opened(model))


def _opened(model: Any) -> Source:
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
    sources = (_opened(moving), _opened(reference))
    out = Path(out)
    read = [path for source in sources for path in source.origin.locations]
    if problems := check_output(out, read, overwrite, True, 0):
        raise PlanError(problems)
    for source in sources:
        source.prepare()
    settings = settings or Settings()
    found = matched(sources[0], sources[1], settings, progress)
    _write(out, found, sources, settings, overwrite)
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
    _refuse_unlike(moving, reference)
    chosen = _chosen(proved(moving), settings, moving, reference)
    if not chosen.groups:
        raise SourceError(f"{moving}: nothing of it may be permuted: {some([*dict.fromkeys(chosen.frozen.values())])}")
    orders: dict[str, np.ndarray] = {}
    spectrum: dict[str, tuple[float, float]] = {}
    total, squares = np.zeros(2), 0.0
    wider = wide_groups(moving, chosen, settings.keep, settings.budget)
    splits: dict[str, Split] = {}
    pair = _pair(reference, moving, settings)
    given = _from_data(pair, moving, chosen, settings)
    parts = list(walk(chosen.groups))
    for done, groups in enumerate(parts):
        names = dict.fromkeys(name for group in groups for name in group.names)
        a, b = ({name: _read(source, name) for name in names} for source in (reference, moving))
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
    moved = {name: (int((o != np.arange(o.shape[-1])).sum()), o.size) for name, o in orders.items()}
    seconds = time.perf_counter() - began
    fit = _fit(pair, moving, reference, chosen, orders, splits) if pair is not None and splits else None
    return Aligned(
        chosen, orders, moved, float(total[0]), float(total[1]), (before, after), spectrum, seconds, splits, fit
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
    pair: Pair, moving: Source, reference: Source, chosen: Layout, orders: Orders, splits: Mapping[str, Split]
) -> Fitted:
    """Least squares for the layers of the wider model, from the mean that it would be without."""
    from weightsmith.align.fit import fitted

    halves = [Halves(g, splits[g.name].merged, splits[g.name].separate) for g in chosen.groups if g.name in splits]
    plain = [group for group in chosen.groups if group.name not in splits]
    places = indices(plain, orders, {name: key.shape for name, key in moving.keys.items()})
    both = (WidenedSource(reference, halves, 0), WidenedSource(ReorderedSource(moving, places), halves, 1))
    start = {
        name: (_read(both[0], name) + _read(both[1], name)) / 2 for name in both[0].keys if both[0].keys[name].floating
    }
    return fitted(reference, start, orders, chosen.groups, splits, pair)


def _from_data(pair: Pair | None, moving: Source, chosen: Layout, settings: Settings) -> Orders | None:
    """The orders of all groups where data decide them; None where weights do."""
    if settings.by == "weights" or pair is None:
        return None
    from weightsmith.align.data import by_activations, learned

    if settings.by == "activations":
        return by_activations(moving, chosen.groups, pair)
    found = learned(chosen.groups, pair, epochs=settings.epochs, lr=settings.lr, seed=settings.seed)
    return {**{n: o for group in chosen.groups for n, o in identity(group).items()}, **found}


def _read(source: Source, name: str) -> Tensor:
    tensor = source.read(name)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# --- which models, which groups --------------------------------------------------------------------


def _refuse_unlike(moving: Source, reference: Source) -> None:
    mine, theirs = ({n: k.shape for n, k in source.keys.items()} for source in (moving, reference))
    if alone := [*(mine.keys() ^ theirs.keys())]:
        where = "moving model" if alone[0] in mine else "reference"
        raise SourceError(f"{moving} and {reference} do not have the same tensors: {alone[0]} is in the {where} only")
    if unlike := [name for name in mine if mine[name] != theirs[name]]:
        name = unlike[0]
        raise SourceError(f"{name} is {list(mine[name])} in {moving} and {list(theirs[name])} in {reference}")
    if (ours := set(layout(moving).groups)) != (other := set(layout(reference).groups)):
        name = min(group.name for group in ours ^ other)
        raise SourceError(f"{moving} and {reference} are not built alike: {name} differs, as config.json describes it")


def _chosen(found: Layout, settings: Settings, moving: Source, reference: Source) -> Layout:
    """The layout without the groups that are to stay."""
    if settings.freeze is not None:
        names = [name for name in settings.freeze if name != NOTHING]
        known = [word for group in found.groups for word in (group.name, group.kind)]
        for name in names:
            if name not in known and name not in found.frozen:
                raise RecipeError(f"no group is called {name!r}{did_you_mean(name, known)}")
        return found.without(names, "as asked for")
    cosine = _cosine(found, moving, reference)
    if cosine >= _RELATED:
        return found.without([RESIDUAL], f"the models come from one: their embeddings have a cosine of {cosine:.3f}")
    return found


def _cosine(found: Layout, moving: Source, reference: Source) -> float:
    """How alike the models are in the tensor that ties the residual stream to the world; 0 where none does."""
    stream = next((group for group in found.groups if group.kind == RESIDUAL), None)
    if stream is None:
        return 0.0
    key = max((moving.key(name) for name in stream.names), key=lambda k: (k.role == "embed", k.numel))
    rows = max(1, _LOOKED_AT // max(key.row_numel, 1))
    a, b = (source.read(key.name, 0, rows).double() for source in (moving, reference))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300))


# --- the folder ------------------------------------------------------------------------------------


def _write(out: Path, found: Aligned, sources: Sequence[Source], settings: Settings, overwrite: bool) -> None:
    orders = {name: order.astype(np.int32) for name, order in found.orders.items() if name not in found.splits}
    for name, one in found.splits.items():
        orders |= {f"{name}/merged": one.merged.astype(np.int32), f"{name}/separate": one.separate.astype(np.int32)}
    stored = {name: order.view(np.uint32) for name, order in orders.items()}
    keys = [Key(name, order.shape, "int32") for name, order in orders.items()]
    for name, tensor in (found.fit.tensors if found.fit is not None else {}).items():
        stored[f"{FITTED}{name}"] = tensor_to_bits(tensor)
        keys.append(Key(f"{FITTED}{name}", tuple(tensor.shape), "float32"))
    made = {"moving": str(sources[0]), "reference": str(sources[1]), **asdict(settings)}
    inputs = {name: source.fingerprint() for name, source in zip(("moving", "reference"), sources, strict=True)}
    identity = {"recipe": made, "inputs": inputs, "version": __version__}
    sink = FolderSink(out, shard_size=1 << 40, identity=identity, overwrite=overwrite, weight_name=ORDERS)
    sink.begin(keys)
    records = []
    try:
        for key in keys:
            bits = stored[key.name]
            sink.write(key.name, 0, bits)
            digest = xxhash.xxh3_128_hexdigest(bits.tobytes())
            records.append({"parts": [[key.name, 0, key.rows, digest]]})
    except BaseException:
        sink.abort()
        raise
    with sink.finishing() as folder:
        _package(folder, found, sources, made, inputs, keys, records)


def _package(
    folder: Path,
    found: Aligned,
    sources: Sequence[Source],
    made: Mapping[str, Any],
    inputs: Mapping[str, Any],
    keys: Sequence[Key],
    records: Sequence[Mapping[str, Any]],
) -> None:
    how = {
        k.name: "fitted by least squares" if k.name.startswith(FITTED) else f"found by matching {made['by']}"
        for k in keys
    }
    manifest = build_manifest(folder, recipe=made, inputs=inputs, keys=keys, records=records, made_by=how, kind=KIND)
    notes = {
        "groups": [group_json(group) for group in found.layout.groups if group.name not in found.splits],
        "wider": [group_json(group) for group in found.layout.groups if group.name in found.splits],
        "frozen": dict(found.layout.frozen),
        "moving": identified(sources[0]),
        "reference": identified(sources[1]),
        "objective": [found.before, found.after],
        "distance": list(found.distance),
        "moved": {name: list(counts) for name, counts in found.moved.items()},
        "losses": {} if found.fit is None else {name: list(pair) for name, pair in found.fit.losses.items()},
        "spectrum": {name: list(values) for name, values in found.spectrum.items()},
    }
    write_manifest(folder, {**manifest, "alignment": notes})
