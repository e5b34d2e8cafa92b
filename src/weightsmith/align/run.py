"""`align`: find the permutation that brings one model's units into another's order, and write it as index vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from weightsmith.core.symmetry import Orders, permute
from weightsmith.io.package.manifest import build_manifest, write_manifest
from weightsmith.io.read.aligned import KIND, ORDERS, group_json, identified
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.io.write.output import FolderSink, check_output

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NOTHING", "Aligned", "Settings", "align", "matched", "symmetries"]

NOTHING = "nothing"
"""Given as the only name to freeze: also the residual stream moves, whatever the models have in common."""

_LOOKED_AT = 1 << 22  # entries of the embedding that tell whether two models come from one
_RELATED = 0.5  # their cosine from which on they do: independent models are near 0, fine-tunes above 0.99


@dataclass(frozen=True)
class Settings:
    """How to match: see `match.match`.

    freeze  groups or kinds of groups; None asks whether the models are related
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

    def __post_init__(self) -> None:
        for name, value in (("restarts", self.restarts), ("max_iter", self.max_iter)):
            if value < 1:
                raise RecipeError(f"{name} = {value} is outside [1, inf)")
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
    splits     of a partial merge: group -> which of its units become one
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
    parts = list(walk(chosen.groups))
    for done, groups in enumerate(parts):
        names = dict.fromkeys(name for group in groups for name in group.names)
        a, b = ({name: _read(source, name) for name in names} for source in (reference, moving))
        here = match(
            groups, a, b, seed=settings.seed, restarts=settings.restarts, max_iter=settings.max_iter,
            normalize=settings.normalize,
        ).orders  # fmt: skip
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
    return Aligned(chosen, orders, moved, float(total[0]), float(total[1]), (before, after), spectrum, seconds, splits)


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
    keys = [Key(name, order.shape, "int32") for name, order in orders.items()]
    made = {"moving": str(sources[0]), "reference": str(sources[1]), **asdict(settings)}
    inputs = {name: source.fingerprint() for name, source in zip(("moving", "reference"), sources, strict=True)}
    identity = {"recipe": made, "inputs": inputs, "version": __version__}
    sink = FolderSink(out, shard_size=1 << 40, identity=identity, overwrite=overwrite, weight_name=ORDERS)
    sink.begin(keys)
    records = []
    try:
        for key in keys:
            bits = orders[key.name].view(np.uint32)
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
    how = dict.fromkeys((key.name for key in keys), "found by weight matching")
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
        "spectrum": {name: list(values) for name, values in found.spectrum.items()},
    }
    write_manifest(folder, {**manifest, "alignment": notes})
