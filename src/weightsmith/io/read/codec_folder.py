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

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith.codecs.tall_masks import TallMasks, consensus_of
from weightsmith.core.errors import OutputError, SourceError, WeightsmithError, did_you_mean
from weightsmith.core.keys import Key, Part
from weightsmith.core.lazy import torch
from weightsmith.core.method import Codec, registry
from weightsmith.io.package.manifest import read_manifest
from weightsmith.io.read.folder import FolderSource
from weightsmith.io.read.source import Bits, Block, Origin, Source, tensor_to_bits
from weightsmith.io.read.views import View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "WEIGHTS",
    "CodecFolder",
    "CodecSource",
    "ConsensusSource",
    "SharedSource",
    "describe",
    "open_codec",
    "own_name",
]

WEIGHTS = "experts"
"""Not 'model': nothing that looks for a model shall take the parts for one."""

_SAMPLE = 4096  # bytes of each tensor
_BLOCK = 8 << 20


def own_name(name: str, expert: str) -> str:
    """Under which name a tensor is stored that only experts have."""
    return f"{name}::own.{expert}"


def describe(
    base: Source, path: str, experts: Iterable[str], encoded: Mapping[str, Codec], alone: bool = False
) -> dict[str, Any]:
    """What weightsmith.json says under 'codec'.  Reads the encoded tensors of the base once.

    path     where the base is found again; '' if it was in memory
    encoded  tensor name -> codec
    alone    there is no base: `base` is the model itself, of which all tensors are stored
    """
    shapes = {key.name: [key.dtype, *key.shape] for key in base.keys.values()}
    codecs: dict[Codec, list[str]] = {}
    for name, codec in encoded.items():
        codecs.setdefault(codec, []).append(name)
    return {
        "experts": list(experts),
        "codecs": [
            {"name": c.name, "parameters": {p.name: getattr(c, p.field) for p in c.parameters()}, "tensors": names}
            for c, names in codecs.items()
        ],
        **({"alone": {"tensors": shapes, "aliases": dict(base.aliases)}} if alone else {}),
        "base": {
            "path": path,
            "sample": "" if alone else _sample(base, chain.from_iterable(codecs.values())),  # in the order above
            "tensors": {} if alone else {name: _content(base, name) for name in encoded},
        },
    }


@dataclass(frozen=True)
class CodecFolder:
    """A compressed folder without its base: what its manifest says, and its files.

    opener  opens the base by its path (`open_source`)
    """

    path: Path
    opener: Callable[[Any], Source]

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
        """Open the base: `given` if it is the one (`strict`: or else an error), otherwise from where it was.

        A model that was compressed by itself has none: whatever is given, the shapes of its tensors take that place.
        """
        if "alone" in self.about:
            return _Shapes(self.path, self.about["alone"])
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
            found = self.opener(path)
        except WeightsmithError as error:
            raise SourceError(f"{self.path}: cannot open its base ({error}); say where the base is now") from None
        difference = self.differs(found)
        if difference is not None:
            raise self._other(found, difference)
        return found

    def refuse_other(self, base: Source) -> None:
        """Raise SourceError unless every encoded tensor of `base` is what it was; reads them all."""
        if "alone" not in self.about and (difference := self.differs(base, thorough=True)) is not None:
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
            f"{self.path}: was not made from {base} ({difference}); give the base it was made from ({origin})"
        )


class _Shapes(Source):
    """In place of a base: zeros in the shapes of a model that was compressed by itself, and its companion files."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.origin = Origin(f"{path} (shapes)", path)
        self._path, self._about = path, about
        try:
            self.keys = {name: Key(name, tuple(map(int, shape)), dtype) for name, (dtype, *shape) in
                         about["tensors"].items()}  # fmt: skip
            self.aliases = {tied: held for tied, held in about["aliases"].items() if held in self.keys}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SourceError(f"{path}: weightsmith.json does not say what its tensors are ({error!r})") from None

    def __reduce__(self) -> tuple[type[_Shapes], tuple[Path, Mapping[str, Any]]]:
        return _Shapes, (self._path, self._about)

    def computes(self, name: str) -> bool:
        return True

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Tensor:
        key = self.key(name)
        rows = len(range(*slice(low, high).indices(key.rows)))
        dtype = torch.float64 if key.dtype == "float64" else torch.float32
        return torch.zeros((rows, *key.shape[1:]) if key.shape else (), dtype=dtype)

    def fingerprint(self) -> dict[str, Any]:
        return {"shapes": dict(self._about["tensors"])}


class _Decoded(View):
    """A model made of the stored parts, block by block as it is read; the experts themselves are not needed.

    Encoded tensors come in float32 (float64 if the base is), not rounded to the dtype that their key states.
    """

    def __init__(
        self, codec_folder: CodecFolder, base: Source, experts: tuple[str, ...], kept: Mapping[str, Key], of: str
    ) -> None:
        """`experts`: whose parts are read; `kept`: name -> what is stored whole under another name or the same."""
        files, path = codec_folder.files, codec_folder.path
        origin = Origin(f"{path}[{of}]", locations=(path, *files.origin.locations))
        super().__init__(base, files, origin=base.origin.beside(origin, label=origin.label, checkpoint=None))
        self.codec_folder, self.base, self.experts, self._kept = codec_folder, base, experts, dict(kept)
        held = {name: Key(name, key.shape, key.dtype) for name, key in kept.items()}
        self.keys = {name: held.get(name, key) for name, key in base.keys.items()} | held

    @abstractmethod
    def _rebuild(self, codec: Codec, parts: Mapping[str, Mapping[str, Tensor]], base: Tensor, offset: int) -> Tensor:
        """Expert -> part name -> rows that cover a block of the base: the model's block."""

    def own(self, name: str) -> tuple[Source, str]:
        name = self.key(name).name
        return (self.codec_folder.files, self._kept[name].name) if name in self._kept else (self.base, name)

    def computes(self, name: str) -> bool:
        return self.key(name).name in self.codec_folder.codecs or super().computes(name)

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        key = self.key(name)
        codec = self.codec_folder.codecs.get(key.name)
        if codec is None:
            return super().block(name, low, high, into)
        base = self.base.read(key.name, low, high)
        base = base if base.dtype == torch.float64 else base.float()
        first = slice(low, high).indices(key.rows)[0] * key.row_numel if key.shape else 0
        rows: dict[str, dict[str, Tensor]] = {expert: {} for expert in self.experts}
        for part in codec.parts(key, self.codec_folder.experts):
            owners = [part.expert] if part.expert else self.experts
            if part.expert and part.expert not in rows:
                continue
            value = self._part(part, first, first + base.numel(), base)
            for owner in owners:
                rows[owner][part.name] = value
        return self._rebuild(codec, rows, base, first)

    def _part(self, part: Part, start: int, stop: int, base: Tensor) -> Tensor:
        value = self.codec_folder.files.read(part.key.name, *part.rows(start, stop))
        return value.to(base.dtype) if value.is_floating_point() else value

    def fingerprint(self) -> dict[str, Any]:
        return {
            "view": self.origin.label,
            "parts": self.codec_folder.files.fingerprint(),
            "base": self.base.fingerprint(),
        }

    def read_cost(self, name: str) -> float:
        # base, shared part and result in float32, and a byte for every unpacked bit
        return 2.5 + 0.5 * len(self.experts) if self.computes(name) else self.base.read_cost(name)


class CodecSource(_Decoded):
    """One expert of a compressed folder; what it had that the base lacks is there too."""

    def __init__(self, codec_folder: CodecFolder, base: Source, expert: str) -> None:
        suffix = own_name("", expert)
        stored = codec_folder.files.keys
        own = {name.removesuffix(suffix): key for name, key in stored.items() if name.endswith(suffix)}
        super().__init__(codec_folder, base, (expert,), _shared(codec_folder, base) | own, expert)

    def _rebuild(self, codec: Codec, parts: Mapping[str, Mapping[str, Tensor]], base: Tensor, offset: int) -> Tensor:
        return codec.decode(parts[self.experts[0]], base, offset)


class ConsensusSource(_Decoded):
    """The consensus merge of all experts of a folder made by tall_masks: base + scale c tau, see `Consensus`."""

    def __init__(self, codec_folder: CodecFolder, base: Source, k: int, scale: float) -> None:
        count = len(codec_folder.experts)
        if other := sorted({codec.name for codec in codec_folder.codecs.values() if not isinstance(codec, TallMasks)}):
            raise SourceError(f"{codec_folder.path}: a consensus needs the masks of tall_masks, not {', '.join(other)}")
        if not 0 <= k <= count + 1:
            raise SourceError(f"{codec_folder.path}: consensus = {k} is outside [0, {count + 1}] for {count} experts")
        of = f"consensus of {k}, scale {scale:g}"
        super().__init__(codec_folder, base, codec_folder.experts, _shared(codec_folder, base), of)
        self.k, self.scale = k, scale

    def _rebuild(self, codec: Codec, parts: Mapping[str, Mapping[str, Tensor]], base: Tensor, offset: int) -> Tensor:
        return consensus_of(parts, base, offset, self.k, self.scale)


class SharedSource(_Decoded):
    """What all experts of a folder have in common: base + tau where that is stored, the mean of whole tensors."""

    def __init__(self, codec_folder: CodecFolder, base: Source) -> None:
        super().__init__(codec_folder, base, codec_folder.experts, _shared(codec_folder, base), "shared")

    def _rebuild(self, codec: Codec, parts: Mapping[str, Mapping[str, Tensor]], base: Tensor, offset: int) -> Tensor:
        own = [parts[expert] for expert in self.experts]
        if "whole" in own[0]:
            return torch.stack([part["whole"] for part in own]).mean(0)
        return base + own[0]["tau"] if "tau" in own[0] else base


def open_codec(path: Path, base: Source | None, expert: str | None, opener: Callable[[Any], Source]) -> CodecSource:
    """One expert of a compressed folder; `base` is used if it is the right one, else the base that the folder names."""
    folder = CodecFolder(path, opener)
    expert = folder.check_expert(expert)
    return CodecSource(folder, folder.base(base), expert)


def _shared(folder: CodecFolder, base: Source) -> dict[str, Key]:
    """What is stored once for all experts."""
    return {name: folder.files.keys[name] for name in base.keys if name in folder.files.keys}


# --- knowing the base ------------------------------------------------------------------------------


def _sample(base: Source, names: Iterable[str]) -> str:
    """One checksum over the first rows of every tensor named, about 4 KiB each."""
    digest = xxhash.xxh3_128()
    for name in names:
        key = base.key(name)
        digest.update(name.encode() + _bytes(base, key, 0, min(key.rows, _rows(key, _SAMPLE))))
    return digest.hexdigest()


def _content(base: Source, name: str) -> str:
    """The checksum of all of a tensor."""
    digest, key = xxhash.xxh3_128(), base.key(name)
    step = _rows(key, _BLOCK)
    for start in range(0, key.rows, step):
        digest.update(_bytes(base, key, start, min(start + step, key.rows)))
    return digest.hexdigest()


def _rows(key: Key, nbytes: int) -> int:
    return max(1, nbytes * max(key.rows, 1) // max(key.nbytes, 1))


def _bytes(source: Source, key: Key, start: int, stop: int) -> bytes:
    found = source.block(key.name, start, stop)
    return (found.array if isinstance(found, Bits) else tensor_to_bits(found)).tobytes()
