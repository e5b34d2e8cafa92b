"""A compressed folder: the parts that a codec made of several experts, and each expert as a view of them.

    weightsmith.json              kind 'codec'; under 'codec': who is in it, which codec, which base
    experts*.safetensors          NAME::tau, NAME::mask.EXPERT, ...   parts of encoded tensors (see `Codec.parts`)
                                  NAME                                stored once, the same for every expert
                                  NAME::own.EXPERT                    tensors that the base lacks, one per expert
    the base model, elsewhere     everything that is not stored here

The base is known by the content of the encoded tensors: a sample of each is compared when the folder is opened,
all of it before an expert is restored to disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith.errors import OutputError, SourceError, WeightsmithError, did_you_mean
from weightsmith.io.folder import FolderSource
from weightsmith.io.manifest import read_manifest
from weightsmith.io.open import folder_kind, open_source, register_opener
from weightsmith.io.source import Source, tensor_to_bits
from weightsmith.keys import Key
from weightsmith.lazy import torch
from weightsmith.method import Codec, Part, registry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WEIGHTS", "CodecFolder", "CodecSource", "describe", "open_codec", "own_name"]

WEIGHTS = "experts"
"""Not 'model': nothing that looks for a model shall take the parts for one."""

_SAMPLE = 4096  # bytes of each tensor
_BLOCK = 8 << 20


def own_name(name: str, expert: str) -> str:
    """Under which name a tensor is stored that only experts have."""
    return f"{name}::own.{expert}"


def describe(base: Source, path: str, experts: Iterable[str], encoded: Mapping[str, Codec]) -> dict[str, Any]:
    """What weightsmith.json says under 'codec'.  Reads the encoded tensors of the base once.

    path     where the base is found again; '' if it was in memory
    encoded  tensor name -> codec
    """
    codecs: dict[Codec, list[str]] = {}
    for name, codec in encoded.items():
        codecs.setdefault(codec, []).append(name)
    return {
        "experts": list(experts),
        "codecs": [
            {"name": c.name, "parameters": {p.name: getattr(c, p.field) for p in c.parameters()}, "tensors": names}
            for c, names in codecs.items()
        ],
        "base": {
            "path": path,
            "sample": _sample(base, encoded),
            "tensors": {name: _content(base, name) for name in encoded},
        },
    }


@dataclass(frozen=True)
class CodecFolder:
    """A compressed folder without its base: what its manifest says, and its files."""

    path: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        try:
            manifest = read_manifest(self.path)
        except OutputError as error:
            raise SourceError(str(error)) from None
        if manifest.get("kind") != "codec":
            raise SourceError(f"{self.path}: not a compressed folder; make one with weightsmith compress")
        found: dict[str, Any] = manifest["codec"]
        return found

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(self.about["experts"])

    @cached_property
    def files(self) -> FolderSource:
        index = self.path / f"{WEIGHTS}.safetensors.index.json"
        return FolderSource(index if index.exists() else self.path)

    @cached_property
    def codecs(self) -> dict[str, Codec]:
        """Tensor name -> the codec that made its parts."""
        found: dict[str, Codec] = {}
        for entry in self.about["codecs"]:
            cls = registry(entry["name"])
            if not issubclass(cls, Codec):
                raise SourceError(f"{self.path}: {entry['name']!r} is no codec")
            fields = {p.name: p.field for p in cls.parameters()}
            codec = cls(**{fields[name]: value for name, value in entry["parameters"].items()})
            found |= dict.fromkeys(entry["tensors"], codec)
        return found

    def differs(self, base: Source, *, thorough: bool = False) -> str | None:
        """What tells that `base` is not the model this folder was made from, or None.

        By default headers and a sample of every tensor are compared; `thorough` reads all of them.
        """
        for name, codec in self.codecs.items():
            if name not in base.keys:
                return f"{name} is missing"
            for part in codec.parts(base.key(name), self.experts):
                stored = self.files.key(part.key.name)
                if stored.shape != part.key.shape:
                    return f"{name} has another shape, {list(base.key(name).shape)}"
        noted = self.about["base"]
        if _sample(base, self.codecs) != noted["sample"]:
            return "its values differ"
        if thorough:
            for name, digest in noted["tensors"].items():
                if _content(base, name) != digest:
                    return f"the values of {name} differ"
        return None

    def base(self, given: Source | None = None, *, strict: bool = False) -> Source:
        """Open the base: `given` if it is the one (`strict`: or else an error), otherwise from where it was."""
        path = self.about["base"]["path"]
        if given is not None:
            difference = self.differs(given)
            if difference is None:
                return given
            if strict or not path:
                raise self._other(given, difference)
        if not path:
            raise SourceError(f"{self.path}: its base was in memory when it was made; say where the base is")
        try:
            found = open_source(path)
        except WeightsmithError as error:
            raise SourceError(f"{self.path}: cannot open its base ({error}); say where the base is now") from None
        difference = self.differs(found)
        if difference is not None:
            raise self._other(found, difference)
        return found

    def refuse_other(self, base: Source) -> None:
        """Raise SourceError unless every encoded tensor of `base` is what it was; reads them all."""
        if (difference := self.differs(base, thorough=True)) is not None:
            raise self._other(base, difference)

    def check_expert(self, expert: str | None) -> str:
        """Return the name if there is such an expert."""
        known = ", ".join(self.experts)
        if expert is None:
            raise SourceError(f"{self.path}: holds {len(self.experts)} models; say which with 'expert:' ({known})")
        if expert not in self.experts:
            raise SourceError(f"{self.path}: no expert {expert!r}{did_you_mean(expert, self.experts)}")
        return expert

    def _other(self, base: Source, difference: str) -> SourceError:
        origin = self.about["base"]["path"] or "in memory"
        return SourceError(
            f"{self.path}: was not made from {base.label} ({difference}); give the base it was made from ({origin})"
        )


class Rebuild:
    """How a block is made of the stored parts; see `One`."""


class CodecSource(Source):
    """One expert of a compressed folder, rebuilt block by block as it is read; the experts are not needed.

    Encoded tensors come in float32 (float64 if the base is), not rounded to the dtype that their key states.
    """

    computed = True

    def __init__(self, folder: CodecFolder, base: Source, expert: str) -> None:
        self._codec_folder, self._base, self._expert = folder, base, folder.check_expert(expert)
        self.label = f"{folder.path}[{expert}]"
        self.folder, self.weight_files, self.aliases = base.folder, base.weight_files, base.aliases
        files = folder.files
        suffix = own_name("", expert)
        own = {n.removesuffix(suffix): files.keys[n] for n in files.keys if n.endswith(suffix)}
        shared = {n: files.keys[n] for n in base.keys if n in files.keys and n not in folder.codecs}
        self._stored = {n: key.name for n, key in (shared | own).items()}
        held = {n: Key(n, key.shape, key.dtype) for n, key in (shared | own).items()}
        self.keys = {n: held.get(n, key) for n, key in base.keys.items()} | held
