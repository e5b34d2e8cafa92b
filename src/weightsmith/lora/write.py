"""Writing an adapter.  Its ranks are known only when all modules are done, so until then factors wait on the disk."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith import __version__
from weightsmith.core.errors import NumericError, PlanError
from weightsmith.core.keys import Key
from weightsmith.core.lazy import torch
from weightsmith.core.problem import Code, Problem, told
from weightsmith.engine.numeric import encode
from weightsmith.io import system
from weightsmith.io.disk import write_file, writing
from weightsmith.io.package.card import CardModel, licences, model_card
from weightsmith.io.package.manifest import build_manifest, write_manifest
from weightsmith.io.read.adapter import CONFIG
from weightsmith.io.read.lora import Module
from weightsmith.io.read.source import bits_to_tensor
from weightsmith.io.read.updates import Experts, Product, assembled
from weightsmith.io.url import absolute
from weightsmith.io.write.output import FolderSink, check_output
from weightsmith.lora.naming import keys_of
from weightsmith.ops.lowrank import Factors, distance, size, widened

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Description", "ModuleReport", "Writer", "Written"]

_WEIGHTS = {"peft": "adapter_model", "diffusers": "pytorch_lora_weights", "kohya": "pytorch_lora_weights"}
_ONE_FILE = 1 << 62  # bytes: peft reads no shards


@dataclass(frozen=True)
class ModuleReport:
    """One module of the result.

    energy  share of the squared singular values that the rank keeps (1: nothing was cut)
    error   |what was to be stored - what is stored| / |what was to be stored|, Frobenius, rounding included
    """

    name: str
    rank: int
    energy: float
    error: float


@dataclass(frozen=True)
class Written:
    """A finished adapter: where, its modules, what the user should look at, and the bytes of its tensors.

    sizes  bytes of each tensor that is kept in full
    tried  how it fared when peft loaded it; '' where that was not tried
    """

    out: Path
    seconds: float
    nbytes: int
    modules: tuple[ModuleReport, ...]
    saved: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    tried: str = ""
    warnings: tuple[Problem, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return max((module.rank for module in self.modules), default=0)

    @property
    def worst(self) -> float:
        """The largest error of a module."""
        return max((module.error for module in self.modules), default=0.0)


@dataclass(frozen=True)
class Description:
    """What goes into weightsmith.json and README.md beside the tensors.

    made     plain values: what was asked for
    inputs   name -> fingerprint
    folders  name -> folder, whose README.md states a licence
    how      how the factors were made, in words
    command  what makes the same folder again
    """

    made: Mapping[str, Any]
    inputs: Mapping[str, Any]
    folders: Mapping[str, Path | None]
    how: str
    command: str
    base: str | None = None


class Writer:
    """Collects an adapter's tensors in an unnamed file beside `out`, then writes the folder at once.

    The folder appears complete or not at all.  Raises PlanError before any work where `out` cannot be written.
    """

    def __init__(self, out: Path, inputs: Iterable[Path], *, overwrite: bool, kind: str = "peft") -> None:
        """`kind`: whose names the tensors get, as in `Adapter`."""
        self.out = absolute(out)
        self._kind = kind
        if problems := check_output(self.out, inputs, overwrite, True, 0):
            raise PlanError(problems)
        self._overwrite = overwrite
        self._began = time.perf_counter()
        self._keys: list[Key] = []
        self._places: list[int] = []
        self._made_by: dict[str, str] = {}
        self._reports: list[ModuleReport] = []
        self._whole: set[str] = set()
        ground = next(folder for folder in self.out.parents if folder.is_dir())
        with writing(ground):
            self._spool: IO[bytes] = system.call(tempfile.TemporaryFile, dir=ground)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    @property
    def ranks(self) -> dict[str, int]:
        return {report.name: report.rank for report in self._reports}

    @property
    def worst(self) -> ModuleReport | None:
        """The module with the largest error so far."""
        return max(self._reports, key=lambda report: report.error, default=None)

    def add(
        self,
        module: Module,
        found: Sequence[Factors],
        wanted: Iterable[Factors | Tensor],
        *,
        dtype: str,
        energy: float = 1.0,
        how: str = "",
    ) -> ModuleReport:
        """Store a module's factors, and measure how well they stand for the matrices `wanted`.

        One pair, or one for each expert or group; the ranks of all are raised to the largest.
        """
        rank = max(part.rank for part in found)
        pieces = [widened(part, rank) for part in found]
        if not all(bool(torch.isfinite(value).all()) for part in pieces for value in part):
            raise NumericError(f"{module.name}: the result holds NaN or Inf; look at the adapters' values and weights")
        b, a = assembled(module.update, pieces)
        kernel = () if isinstance(module.update, Experts) else module.update.shape[2:]
        b_shape = (*b.shape, *(1 for _ in kernel))
        a_shape = (a.shape[0], module.update.shape[1], *kernel) if kernel else tuple(a.shape)
        keys = keys_of(module.name, b_shape, a_shape, dtype, embedding=module.embedding, kind=self._kind)
        for key, value in zip(keys, (b, a), strict=True):
            self._put(key, encode(value.reshape(key.shape), key, 0), how)
        rank = a.shape[0] if isinstance(module.update, Product) else rank  # groups share the rows of A
        if self._kind == "kohya":
            alpha = Key(f"{module.name}.alpha", (), "float32")
            self._put(alpha, np.array(rank, np.float32).view(np.uint32), "the rank")
        stored = [Factors(*(_rounded(value, dtype) for value in part)) for part in pieces]
        report = ModuleReport(module.name, rank, energy, _error(stored, wanted))
        self._reports.append(report)
        return report

    def add_whole(self, name: str, value: Tensor, dtype: str, how: str) -> None:
        """Store a tensor in full, under the name that peft gives it."""
        key = Key(name, tuple(value.shape), dtype)
        self._whole.add(name)
        self._put(key, encode(value, key, 0), how)

    def _put(self, key: Key, bits: np.ndarray, how: str) -> np.ndarray:
        with writing(self.out):
            self._places.append(self._spool.seek(0, os.SEEK_END))
            system.call(self._spool.write, np.ascontiguousarray(bits).tobytes())
        self._keys.append(key)
        self._made_by[key.name] = how
        return bits

    def finish(
        self,
        config: Mapping[str, Any],
        about: Description,
        *,
        saved: Sequence[str] = (),
        warnings: Sequence[str] = (),
        weights: Mapping[str, float] | None = None,
    ) -> Written:
        """Write the folder: weights, configuration, model card, weightsmith.json."""
        identity = {"recipe": about.made, "inputs": about.inputs, "version": __version__}
        sink = FolderSink(
            self.out,
            shard_size=_ONE_FILE,
            identity=identity,
            resume=True,  # what an interrupted run of the same request has left is done anew
            overwrite=self._overwrite,
            weight_name=_WEIGHTS[self._kind],
        )
        sink.begin(self._keys)
        records = []
        try:
            for key, place in zip(self._keys, self._places, strict=True):
                with writing(self.out):
                    self._spool.seek(place)
                    raw = system.call(self._spool.read, key.nbytes)
                sink.write(
                    key.name, 0, np.frombuffer(raw, f"u{key.nbytes // max(key.numel, 1) or 1}").reshape(key.shape)
                )
                records.append({"parts": [[key.name, 0, key.rows, xxhash.xxh3_128_hexdigest(raw)]]})
        except BaseException:
            sink.abort()
            raise
        with sink.finishing() as folder:
            self._package(folder, config, about, records)
        return Written(
            out=self.out,
            seconds=time.perf_counter() - self._began,
            nbytes=sum(key.nbytes for key in self._keys),
            modules=tuple(self._reports),
            saved=tuple(saved),
            sizes={key.name: key.nbytes for key in self._keys if key.name in self._whole},
            warnings=tuple(told(Code.ADAPTER, dict.fromkeys(warnings))),
            weights=weights or {},
        )

    def _package(
        self, folder: Path, config: Mapping[str, Any], about: Description, records: Sequence[Mapping[str, Any]]
    ) -> None:
        stated = licences(about.folders)
        if self._kind == "peft":
            write_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        card = model_card(
            title=self.out.name,
            models=[CardModel(name) for name in about.folders if name != "base"],
            method=about.how,
            recipe=about.made,
            base=None if about.base is None else CardModel("base", _hub_id(about.base)),
            licences=stated,
            about={"library_name": "peft" if self._kind == "peft" else "diffusers"},
            version=__version__,
            command=about.command,
        )
        write_file(folder / "README.md", card)
        manifest = build_manifest(
            folder,
            recipe=about.made,
            inputs=about.inputs,
            keys=self._keys,
            records=records,
            made_by=self._made_by,
            licences=stated,
            kind="adapter",
        )
        modules = {report.name: asdict(report) for report in self._reports}
        write_manifest(folder, {**manifest, "modules": modules})


def _rounded(value: Tensor, dtype: str) -> Tensor:
    """A tensor as it is stored."""
    key = Key("", tuple(value.shape), dtype)
    return bits_to_tensor(encode(value, key, 0), dtype).reshape(value.shape)


def _error(stored: Sequence[Factors], wanted: Iterable[Factors | Tensor]) -> float:
    """|what was wanted - what is stored| / |what was wanted|, over all pieces."""
    missed, whole = 0.0, 0.0
    for found, target in zip(stored, wanted, strict=True):
        if isinstance(target, Factors):
            missed = math.hypot(missed, distance(found, target))
            whole = math.hypot(whole, size(target))
        else:
            rest = target - Factors(found.b.float(), found.a.float()).product
            missed = math.hypot(missed, float(torch.linalg.vector_norm(rest, dtype=torch.float64)))
            whole = math.hypot(whole, float(torch.linalg.vector_norm(target, dtype=torch.float64)))
    return missed / whole if whole else 0.0


def _hub_id(name: str) -> str | None:
    local = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()
    return None if local else name
