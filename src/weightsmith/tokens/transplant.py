"""A model shown with another tokenizer: rows of shared tokens are its own, the others are approximated."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError, WeightsmithError, did_you_mean
from weightsmith.core.lazy import torch
from weightsmith.io.read.layers import config_of
from weightsmith.io.read.source import Cost, Source
from weightsmith.ops.noise import uniform_bits
from weightsmith.ops.pursuit import GRAM, inner_products, omp
from weightsmith.tokens.approximate import Affine, Rope, basis, carried, interpolate, landmarks, pursue_with_rope
from weightsmith.tokens.numbering import Numbering
from weightsmith.tokens.pairing import Pairing
from weightsmith.tokens.view import VocabularyView, gather

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METHODS", "Transplant", "TransplantedSource"]

_STEP = 4096  # rows at a time of a pass over a whole tensor
_KEPT = 8  # windows of finished rows
_PART = 8 << 20  # elements of a tensor that are worked on at a time


@dataclass(frozen=True)
class Transplant:
    """How rows are made for tokens that the model lacks.

    method    see METHODS
    k         anchors that each new row is made of (omp, mp_rope, common_interpolation, stb)
    metric    euclidean or cosine; weights: distance_proportional, barycentric or least_squares (common_interpolation)
    subword   mean, sum, weighted_mean or first_last (subword)
    prefix_match, byte_match   no, embed, lm_head or yes: take the row of the longest known beginning of the token, or
              of the byte token for a letter and the other way round, before anything is approximated
    magikarp  leave under-trained tokens out of the anchors (arXiv 2405.05417)
    table     omp: keep the inner products of all pairs of anchors, if they are 2048 to 32768: 4 n^2 bytes for each
              tensor; the rows are then made some ten times as fast
    batch     rows that are computed together
    noise, scale   new rows are multiplied by scale after normal noise of this deviation was added
    multiple  the number of rows is rounded up to a multiple of it
    """

    method: str = "omp"
    k: int = 64
    metric: str = "euclidean"
    weights: str = "distance_proportional"
    subword: str = "mean"
    prefix_match: str = "no"
    byte_match: str = "no"
    magikarp: bool = False
    table: bool = True
    batch: int = 512
    noise: float = 0.0
    scale: float = 1.0
    multiple: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        where = ("no", "embed", "lm_head", "yes")
        for name, known in (
            ("method", tuple(METHODS)),
            ("metric", ("euclidean", "cosine")),
            ("weights", ("distance_proportional", "barycentric", "least_squares")),
            ("subword", ("mean", "sum", "weighted_mean", "first_last")),
            ("prefix_match", where),
            ("byte_match", where),
        ):
            if getattr(self, name) not in known:
                raise WeightsmithError(f"{name}: {getattr(self, name)!r} is none of {', '.join(known)}"
                                       f"{did_you_mean(str(getattr(self, name)), known)}")  # fmt: skip
        for name in ("k", "batch", "multiple"):
            if getattr(self, name) < 1:
                raise WeightsmithError(f"{name}: {getattr(self, name)} is outside [1, inf)")


@dataclass(frozen=True)
class _Space:
    """Rows of the anchors: [n, d] of the donor, [n, e] of the model; the inner products of the donor's [n, n]."""

    theirs: Tensor
    ours: Tensor
    gram: Tensor | None = None


class TransplantedSource(VocabularyView):
    """`source` in the vocabulary of `donor`.

    pairs   token tensor of the model -> the donor's that stands for the same (embedding, head)

    Rows are computed in windows of `how.batch`, whatever is asked for, so that the bytes do not depend on the cut;
    several threads work on several windows.  The anchors' rows of a tensor are held in memory.
    """

    def __init__(
        self,
        source: Source,
        donor: Source,
        pairs: Mapping[str, str],
        tokens: Mapping[str, Pairing],
        how: Transplant,
        numbering: Numbering,
    ) -> None:
        super().__init__(source, tokens, next(iter(tokens.values())).rows, numbering)
        self.parts = (source, donor)
        self.donor, self.pairs, self.pairings, self.how = donor, dict(pairs), dict(tokens), how
        self._forget()
        if how.method == "mp_rope":
            self.ropes = (
                _rope(donor, self._width(donor, self.pairs.values())),
                _rope(source, self._width(source, pairs)),
            )
        if how.method in _BY_ANCHOR:
            for name in pairs:
                self._check_anchors(name)
        donors = replace(donor.origin, remarks=(), cost=Cost(donor.origin.cost.download, self._held_bytes()))
        self.origin = self.origin.beside(donors)

    def _forget(self) -> None:
        self._making = threading.RLock()  # one thread makes what all windows of a tensor need
        self._spaces: dict[str, _Space] = {}
        self._maps: dict[str, Affine] = {}
        self._moments: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._windows: OrderedDict[tuple[str, int], Future[Tensor]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_making", "_spaces", "_maps", "_moments", "_windows")
        return {k: v for k, v in super().__getstate__().items() if k not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def fingerprint(self) -> dict[str, Any]:
        return {"transplant": asdict(self.how), "source": self.source.fingerprint(), "donor": self.donor.fingerprint()}

    def _held_bytes(self) -> int:
        """What the anchors of all tensors take, as long as rows are made."""
        if self.how.method not in _BY_ANCHOR:
            return 0
        count = {name: int(self.pairings[name].anchors.size) for name in self.pairs}
        widths = {name: self._width(self, [name]) + self._width(self.donor, [self.pairs[name]]) for name in self.pairs}
        return sum(4 * count[n] * (widths[n] + self._tabled(n) * count[n]) for n in self.pairs)

    def read_cost(self, name: str) -> float:
        key = self.key(name)
        cost = super().read_cost(name)
        if key.name not in self.pairs or self.how.method not in _BY_ANCHOR:
            return cost
        width, theirs = key.row_numel, self._width(self.donor, [self.pairs[key.name]])
        anchors, k, batch = int(self.pairings[key.name].anchors.size), self.how.k, self.how.batch
        held = batch * (theirs + width + anchors) + 128 * k * (theirs + width)  # 64 fits in float64
        held += k * anchors if self._tabled(key.name) else batch * (k * theirs + anchors)
        return cost + held / max(min(key.numel, _PART), 1)

    def _tabled(self, name: str) -> bool:
        return self.how.table and self.how.method == "omp" and self.pairings[name].anchors.size in GRAM

    def rows_of(self, name: str, start: int, stop: int) -> Tensor:
        step = self.how.batch
        pieces = []
        for index in range(start // step, -(-stop // step)):
            low = index * step
            pieces.append(self._window(name, index)[max(start - low, 0) : stop - low])
        return torch.cat(pieces) if pieces else torch.zeros(0, *self.key(name).shape[1:])

    def _window(self, name: str, index: int) -> Tensor:
        place = (name, index)
        with self._lock:
            found = self._windows.get(place)
            mine = found is None
            if found is None:
                found = self._windows[place] = Future()
                while len(self._windows) > _KEPT:
                    self._windows.popitem(last=False)
            else:
                self._windows.move_to_end(place)
        if mine:
            low = index * self.how.batch
            try:
                found.set_result(self._made(name, low, min(low + self.how.batch, self.key(name).rows)))
            except BaseException as error:
                found.set_exception(error)
        return found.result()

    def _made(self, name: str, low: int, high: int) -> Tensor:
        pairing = self.pairings[name]
        own, theirs = pairing.own[low:high], pairing.theirs[low:high]
        key = self.source.key(name)
        dtype = torch.float64 if key.dtype == "float64" else torch.float32
        out = torch.zeros((high - low, *key.shape[1:]), dtype=dtype)
        here = own >= 0
        if here.any():
            out[torch.from_numpy(here)] = gather(self.source, name, own[here]).to(dtype)
        if name not in self.pairs:
            return out  # a bias: 0 for new tokens
        new = ~here & (theirs >= 0)
        if new.any():
            rows = low + np.flatnonzero(new)
            out[torch.from_numpy(new)] = self._approximated(name, rows).to(dtype)
        if (rest := ~here & ~new).any():
            out[torch.from_numpy(rest)] = self._mean(name).to(dtype)
        return out

    def _approximated(self, name: str, rows: np.ndarray) -> Tensor:
        found = METHODS[self.how.method](self, name, rows)
        if self.how.noise:
            found = found + self.how.noise * self.normal(name, rows, "noise")
        return found * self.how.scale

    # -- what the methods ask for

    def targets(self, name: str, rows: np.ndarray) -> Tensor:
        """The donor's rows for new tokens, float32."""
        return gather(self.donor, self.pairs[name], self.pairings[name].theirs[rows]).float()

    def space(self, name: str) -> _Space:
        with self._making:
            if name not in self._spaces:
                pairing = self.pairings[name]
                theirs = gather(self.donor, self.pairs[name], pairing.theirs[pairing.anchors]).float()
                ours = gather(self.source, name, pairing.shared[pairing.anchors]).float()
                self._spaces[name] = _Space(theirs, ours, inner_products(theirs) if self._tabled(name) else None)
            return self._spaces[name]

    def map(self, name: str, make: Callable[[], Affine]) -> Affine:
        """What `make` finds, once for a tensor."""
        with self._making:
            if name not in self._maps:
                self._maps[name] = make()
            return self._maps[name]

    def _mean(self, name: str) -> Tensor:
        return self.moments(name, spread=False)[0]

    def moments(self, name: str, *, spread: bool) -> tuple[Tensor, Tensor | None]:
        """Mean [e] and, with `spread`, covariance [e, e] of the model's rows, float64."""
        with self._making:
            known = self._moments.get(name)
            if known is None or (spread and known[1] is None):
                known = self._moments[name] = self._measured(name, spread)
            return known

    def _measured(self, name: str, spread: bool) -> tuple[Tensor, Tensor | None]:
        key = self.source.key(name)
        total = torch.zeros(key.shape[1:], dtype=torch.float64)
        square = torch.zeros(*key.shape[1:], *key.shape[1:], dtype=torch.float64) if spread else None
        for low in range(0, key.rows, _STEP):
            block = self.source.read(name, low, min(low + _STEP, key.rows)).double()
            total += block.sum(dim=0)
            if square is not None:
                square += block.T @ block
        mean = total / key.rows
        return mean, None if square is None else square / key.rows - mean.outer(mean)

    def normal(self, name: str, rows: np.ndarray, salt: str) -> Tensor:
        """Standard normal numbers for the given rows, [n, e] in float64; those of a row never change."""
        width = self.key(name).row_numel
        bits = [uniform_bits(self.how.seed, name, "", salt, int(row) * width, width) for row in rows]
        uniform = (torch.from_numpy(np.stack(bits).astype(np.float64)) + 0.5) / 2**32
        found: Tensor = torch.special.ndtri(uniform)
        return found

    def split(self, name: str, rows: np.ndarray) -> list[list[int]]:
        """The model's tokens that each new token's text is cut into, [] where it has none."""
        return [self.pairings[name].pieces.get(int(row), []) for row in rows]

    def is_head(self, name: str) -> bool:
        return self.source.key(name).role == "head"

    def _check_anchors(self, name: str) -> None:
        count = int(self.pairings[name].anchors.size)
        needs = self.how.k if self.how.method != "landmark_pca" else 2
        if not count:
            raise WeightsmithError(
                f"{self.source} and {self.donor} share no tokens, which {self.how.method} starts from; "
                f"take the method subword or mean"
            )
        if count < needs:
            raise WeightsmithError(f"k: {needs} is more than the {count} tokens that both vocabularies share; lower it")

    def _width(self, source: Source, names: Any) -> int:
        return source.key(next(iter(names))).row_numel


# --- the methods ---------------------------------------------------------------------------------


def _omp(view: TransplantedSource, name: str, rows: np.ndarray) -> Tensor:
    space = view.space(name)
    indices, coefficients = omp(view.targets(name, rows), space.theirs, view.how.k, space.gram)
    return carried(coefficients, indices, space.ours)


def _interpolated(view: TransplantedSource, name: str, rows: np.ndarray) -> Tensor:
    space, how = view.space(name), view.how
    indices, weights = interpolate(view.targets(name, rows), space.theirs, how.k, how.metric, how.weights)
    return carried(weights, indices, space.ours)


def _landmarks(view: TransplantedSource, name: str, rows: np.ndarray) -> Tensor:
    def found() -> Affine:
        space = view.space(name)
        return landmarks(space.theirs, space.ours)

    return view.map(name, found)(view.targets(name, rows))


def _basis(view: TransplantedSource, name: str, rows: np.ndarray) -> Tensor:
    def found() -> Affine:
        space = view.space(name)
        return basis(space.theirs, space.ours, view.how.k)

    return view.map(name, found)(view.targets(name, rows))


def _with_rope(view: TransplantedSource, name: str, rows: np.ndarray) -> Tensor:
    space = view.space(name)
    return pursue_with_rope(view.targets(name, rows), space.theirs, space.ours, view.how.k, *view.ropes)


def _mean(view: TransplantedSource, name: str, rows: np.ndarray) -> Tensor:
    return view.moments(name, spread=False)[0].expand(len(rows), -1)


def _zero(view: TransplantedSource, name: str, rows: np.ndarray) -> Tensor:
    return torch.zeros(len(rows), view.key(name).row_numel)


def _random(view: TransplantedSource, name: str, rows: np.ndarray) -> Tensor:
    """Normal numbers, as large as the model's own."""
    mean, spread = view.moments(name, spread=True)
    assert spread is not None
    return view.normal(name, rows, "randn") * (spread.diagonal() + mean.square()).mean().clamp(min=0).sqrt()


def _like_the_rows(view: TransplantedSource, name: str, rows: np.ndarray) -> Tensor:
    """Samples of the normal distribution with the mean and covariance of the model's rows (Hewitt 2021)."""

    def found() -> Affine:
        mean, spread = view.moments(name, spread=True)
        assert spread is not None
        values, vectors = torch.linalg.eigh(spread)
        return Affine(torch.zeros_like(mean), values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T, mean)

    return view.map(name, found)(view.normal(name, rows, "hewitt"))


def _subwords(view: TransplantedSource, name: str, rows: np.ndarray) -> Tensor:
    """The rows of the pieces that the model's tokenizer cuts a token's text into, combined."""
    how, head = view.how.subword, view.is_head(name)
    out = _mean(view, name, rows).clone()
    for i, pieces in enumerate(view.split(name, rows)):
        if not pieces:
            continue
        if how == "first_last":  # what is predicted begins with the first piece; what was read ends with the last
            pieces = [pieces[0] if head else pieces[-1]]
        found = gather(view.source, name, np.asarray(pieces)).double()
        shares = torch.arange(1, len(pieces) + 1, dtype=torch.float64)
        if how != "weighted_mean":
            shares = torch.ones_like(shares)
        elif head:
            shares = shares.flip(0)
        out[i] = (shares.unsqueeze(1) * found).sum(dim=0) / (1.0 if how == "sum" else shares.sum())
    return out


METHODS: Mapping[str, Callable[[TransplantedSource, str, np.ndarray], Tensor]] = {
    "omp": _omp,
    "common_interpolation": _interpolated,
    "subword": _subwords,
    "mean": _mean,
    "zero": _zero,
    "randn": _random,
    "john_hewitt": _like_the_rows,
    "landmark_pca": _landmarks,
    "stb": _basis,
    "mp_rope": _with_rope,
}
"""Name -> rows [n, e] for new tokens: (view, tensor, output rows)."""

_BY_ANCHOR = ("omp", "common_interpolation", "landmark_pca", "stb", "mp_rope")


def _rope(source: Source, width: int) -> Rope:
    try:
        config = json.loads(config_of(source) or "{}")
    except ValueError:
        config = {}
    scopes = [config, config.get("text_config"), config.get("rope_parameters")] if isinstance(config, dict) else []
    found: dict[str, Any] = {}
    for scope in scopes:
        found = {**(scope if isinstance(scope, dict) else {}), **found}
    heads, base = found.get("num_attention_heads"), found.get("rope_theta", 10000.0)
    if not isinstance(heads, int) or heads < 1 or width % (2 * heads) or not isinstance(base, (int, float)):
        raise SourceError(f"{source}: mp_rope needs num_attention_heads and rope_theta that fit rows of {width}")
    return Rope(heads, float(base))
