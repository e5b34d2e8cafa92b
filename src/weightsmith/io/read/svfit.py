"""SVFit adapters: trained changes of the leading singular values of a weight (arXiv:2409.05926).

A folder with `adapter_config.json` (peft_type SVFIT) and, for each module, `svfit_delta` [r], `svfit_s` [r] and
perhaps the vectors `svfit_u` [outputs, r] and `svfit_v` [r, inputs, *kernel].  Without those they are found again from
the base, whose weights must then be the ones trained on: the configuration holds their shapes and hashes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.io.read.source import Block, Source, tensor_to_bits
from weightsmith.io.read.updates import LowRank
from weightsmith.io.read.views import View
from weightsmith.ops.lowrank import Factors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PARTS", "Singular", "SpectralSource", "decomposed", "fingerprint", "refuse_another", "singular"]

PARTS = ("svfit_delta", "svfit_s", "svfit_u", "svfit_v")


@dataclass(frozen=True)
class Singular(LowRank):
    """U diag(delta) V^T: names of the vectors, present in the file or not, and of the changes.

    hash, dtype  of the weight trained on, and what the vectors were rounded to while they ran
    """

    u: str
    delta: str
    v: str
    s: str
    full: tuple[int, ...]
    count: int
    hash: str
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.full

    @property
    def rank(self) -> int:
        return self.count

    @property
    def stored(self) -> tuple[str, ...]:
        return self.u, self.delta, self.v

    def needs_vectors(self, file: Source) -> None:
        """SourceError where the vectors are neither in the file nor found again from a base."""
        if self.u not in file.keys:
            raise SourceError(
                f"{file}: holds singular values without their vectors; save it with bases=True, or use it on its base"
            )

    def factors(self, file: Source) -> Factors:
        self.needs_vectors(file)
        b = file.read(self.u).float() * file.read(self.delta).float()
        return Factors(b, file.read(self.v).float().flatten(1))


def singular(config: Mapping[str, Any], file: Source, label: str, name: str, parts: Mapping[str, str]) -> Singular:
    """The change of one module, once its parts fit each other and the configuration."""
    weights = config.get("base_weights")
    said = weights.get(name) if isinstance(weights, dict) else None
    said = said if isinstance(said, dict) else {}
    shape = tuple(said["shape"]) if isinstance(said.get("shape"), list) else ()
    good = len(shape) >= 2 and all(type(n) is int and n > 0 for n in shape) and isinstance(said.get("xxh3_64"), str)
    if not good or said.get("dtype") not in ("float64", "float32", "bfloat16", "float16"):
        raise SourceError(f"{label}: base_weights of its configuration lacks shape, dtype and hash of {name!r}")
    if not {"svfit_delta", "svfit_s"} <= parts.keys() or ("svfit_u" in parts) != ("svfit_v" in parts):
        raise SourceError(f"{label}: {name!r} has {', '.join(sorted(parts))}, not all parts of an SVFit adapter")
    delta = file.key(parts["svfit_delta"])
    count = delta.numel
    stem = delta.name.removesuffix("svfit_delta")
    found = Singular(
        f"{stem}svfit_u", delta.name, f"{stem}svfit_v", parts["svfit_s"], shape, count, said["xxh3_64"], said["dtype"]
    )
    wanted = {
        "svfit_delta": (count,),
        "svfit_s": (count,),
        "svfit_u": (shape[0], count),
        "svfit_v": (count, *shape[1:]),
    }
    for part, stored in parts.items():
        key = file.key(stored)
        if not key.floating or key.shape != wanted[part]:
            raise SourceError(
                f"{label}: {stored!r} is {key.dtype} {list(key.shape)}, expected {list(wanted[part])} for a weight of "
                f"{list(shape)}"
            )
    return found


def decomposed(weight: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors and values of a weight [out, in, *kernel]: u [out, r], s [r], v [r, in * kernel].

    In float64, so that the same weight gives the same result; each pair's sign makes the largest entry of u positive.
    """
    u, s, v = torch.linalg.svd(weight.detach().flatten(1).double().cpu(), full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], v[:rank]
    sign = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0)
    return u * sign, s, v * sign[:, None]


def fingerprint(weight: Tensor) -> str:
    """Of a weight's values as float32, however they are stored."""
    return xxhash.xxh3_64_hexdigest(tensor_to_bits(weight.detach().float().cpu()).tobytes())


class SpectralSource(View):
    """An adapter's file with the singular vectors that it does not hold, found again from the base's weights."""

    def __init__(self, file: Source, base: Source, missing: Mapping[str, tuple[str, bool, Singular]]) -> None:
        """`missing`: name of u -> the base's tensor, whether that is stored [in, out], what it belongs to."""
        super().__init__(file, base, origin=file.origin)
        self._of: dict[str, tuple[str, bool, Singular]] = {}
        self.keys = dict(file.keys)
        for weight, flip, update in missing.values():
            for name, shape in ((update.u, (update.full[0], update.rank)), (update.v, (update.rank, *update.full[1:]))):
                self._of[name] = weight, flip, update
                self.keys[name] = Key(name, shape, "float32")
        self._last: tuple[str, tuple[Tensor, Tensor]] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def computes(self, name: str) -> bool:
        return name in self._of or super().computes(name)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        if name not in self._of:
            return super().block(name, low, high, into)
        weight, flip, update = self._of[name]
        with self._lock:
            if self._last is None or self._last[0] != update.u:
                self._last = update.u, self._vectors(weight, flip, update)
            u, v = self._last[1]
        return (u if name == update.u else v)[low:high]

    def _vectors(self, name: str, flip: bool, update: Singular) -> tuple[Tensor, Tensor]:
        weight = self.parts[1].read(name)
        refuse_another(weight, update.hash, f"{self.source}: {name!r} of {self.parts[1]}")
        u, s, v = decomposed(weight.T if flip else weight, update.rank)
        stored = self.source.read(update.s).double()
        if not bool(((s - stored).abs() <= 1e-4 * s[0]).all()):
            raise SourceError(f"{self.source}: the singular values of {name!r} are not the ones trained from")
        run = getattr(torch, update.dtype)  # as they were rounded while the values trained
        return u.to(run).float(), v.to(run).float().reshape(update.rank, *update.full[1:])


def refuse_another(weight: Tensor, hash_: str, where: str) -> None:
    """SourceError where a weight is not the one that singular values were trained on."""
    if fingerprint(weight) != hash_:
        raise SourceError(
            f"{where} is not the weight that these singular values were trained on (other values, or rounded to "
            "another dtype): give that base, or save the adapter with bases=True"
        )
