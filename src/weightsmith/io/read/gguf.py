"""GGUF files of llama.cpp in F32, F16 or BF16, under the names and in the order that Hugging Face gives the tensors.

A model may be split (`model-00001-of-00003.gguf`, by llama-gguf-split): any of its files stands for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weightsmith.core.errors import MissingExtra, SourceError, some
from weightsmith.core.keys import DTYPES, Key, good_name
from weightsmith.io.read.files import File
from weightsmith.io.read.small import short
from weightsmith.io.read.source import Bits, Origin, Source

__all__ = ["GgufSource"]

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_MOST = 3_000_000  # values in the metadata; a vocabulary and its merges have about a million
_PERMUTED = frozenset({"llama"})
"""Architectures whose rows of q and k llama.cpp's converter puts in another order (pairs for its rotation)."""
_KNOWN = frozenset({"llama", "qwen2", "qwen3", "phi3"})
"""Architectures whose tensors are stored as they are, apart from that; others (Gemma: norms + 1) are not read."""
_FUSED = {"phi3": {"mlp.up_proj": "mlp.gate_up_proj"}}
_OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BLOCK = (
    *("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o", "qkv")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_LACKS = (
    "is a GGUF file, so the result has no config.json and no tokenizer; for them give a Hugging "
    "Face folder as the base or first model"
)
_LEFT = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tables that follow from config.json."""
_COUNT, _TOTAL = "split.count", "split.tensors.count"
_SPLIT = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


class _Stored(NamedTuple):
    """A tensor in the file, under its Hugging Face name."""

    key: Key
    offset: int
    heads: int  # of which the rows are to be put back in order; 0: they are
    part: int = 0  # the file that holds it


class GgufSource(Source):
    """One GGUF model, in one file or in several.

    It has no config.json or tokenizer files: these come from another model of the merge.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        found = _read(self.path)
        paths = _parts(self.path, found.fields)
        headers = [found if part == self.path else _read(part) for part in paths]
        self._files = [File(part) for part in paths]
        self._tensors = _joined(paths, headers, [file.size for file in self._files])
        self.origin = Origin(str(path), locations=tuple(paths), lacks=_LACKS)
        self.keys = {name: stored.key for name, stored in self._tensors.items()}
        if _HEAD not in self.keys and _EMBEDDING in self.keys:  # llama.cpp then takes the embedding
            self.aliases = {_HEAD: _EMBEDDING}

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        key, offset, heads, part = self._tensors[self.key(name).name]
        width = DTYPES[key.dtype].itemsize
        pitch = key.row_numel * width
        first, last, _ = slice(low, high).indices(key.rows)
        begin, end = (first, last) if not heads else _span(first, last, key.rows // heads)
        rows = max(end - begin, 0)
        data = self._files[part].read(offset + begin * pitch, rows * pitch, repr(name)).view(f"u{width}")
        found = data.reshape((rows, *key.shape[1:]) if key.shape else ())
        return Bits(found[_order(np.arange(first, last), key.rows // heads) - begin] if heads else found, key.dtype)

    def fingerprint(self) -> dict[str, Any]:
        files: dict[str, Any] = {}
        for file in self._files:
            file.refuse_changed()
            files[Path(file.path).name] = {"size": file.size, **file.stamp()}
        return {"files": files}


def _span(first: int, last: int, size: int) -> tuple[int, int]:
    """Whole heads of `size` rows that hold rows first..last."""
    return first // size * size, -(-last // size) * size


def _order(rows: np.ndarray, size: int) -> np.ndarray:
    """Where the file has a row: within a head, row j * size/2 + i of Hugging Face is row 2 i + j there."""
    head, within = np.divmod(rows, size)
    half, i = np.divmod(within, size // 2)
    return np.asarray(head * size + 2 * i + half)


# --- the header ------------------------------------------------------------------------------------


def _parts(path: Path, fields: Mapping[str, Any]) -> list[Path]:
    """All files of the model that a file is a part of, in order."""
    count = _number(fields, _COUNT, path, 0, least=0)  # llama-gguf-split --merge leaves 0
    if count <= 1:
        return [path]
    named = _SPLIT.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise SourceError(
            f"{path}: one of {count} parts of a model, but its name does not end in -00001-of-{count:05}.gguf, so the "
            "others cannot be found; give it its name back"
        )
    paths = [path.with_name(f"{named['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise SourceError(f"{path}: one of {count} parts of a model, of which {some(missing)} is not there")
    return paths


def _joined(paths: Sequence[Path], headers: Sequence[Any], sizes: Sequence[int]) -> dict[str, _Stored]:
    """The tensors of all parts; the first one says what the model is."""
    first, fields = paths[0], headers[0].fields
    total = sum(len(header.tensors) for header in headers)
    if (noted := _number(fields, _TOTAL, first, total)) != total:
        raise SourceError(f"{first}: {_TOTAL} = {noted}, but the {len(paths)} parts hold {total} tensors")
    stored: dict[str, _Stored] = {}
    for part, (path, header, size) in enumerate(zip(paths, headers, sizes, strict=True)):
        for name, found in _tensors_of(path, size, fields, header.tensors, total).items():
            if name in stored:
                raise SourceError(f"{path}: {short(name)} is in another part too")
            stored[name] = found._replace(part=part)
    return stored


def _tensors_of(
    path: Path, size: int, fields: Mapping[str, Any], tensors: Sequence[Any], total: int
) -> dict[str, _Stored]:
    """The tensors of one file; fields: the metadata of the model; total: how many tensors that has."""
    arch = _text(fields, "general.architecture")
    if arch not in _KNOWN:
        raise SourceError(
            f"{path}: GGUF of architecture {short(arch)}, whose tensors cannot be mapped back; known: "
            f"{', '.join(sorted(_KNOWN))}; give the Hugging Face folder that it was converted from"
        )
    blocks = _number(fields, f"{arch}.block_count", path)
    if blocks > total:  # the table of names grows with it
        raise SourceError(f"{path}: {arch}.block_count = {blocks}, but the file has {total} tensors")
    names = _names(arch, blocks)
    heads = _number(fields, f"{arch}.attention.head_count", path)
    shared = _number(fields, f"{arch}.attention.head_count_kv", path, heads)
    stored: dict[str, _Stored] = {}
    for tensor in tensors:
        if tensor.name in _LEFT:
            continue
        stem, _, kind = tensor.name.rpartition(".")
        name = names.get(stem)
        if name is None or kind not in ("weight", "bias") or not good_name(tensor.name):
            raise SourceError(f"{path}: {short(tensor.name)} has no Hugging Face name in architecture {arch}")
        dtype = _DTYPES.get(tensor.tensor_type.name)
        if dtype is None:
            raise SourceError(
                f"{path}: {tensor.name} is quantised ({tensor.tensor_type.name}), and merging needs the weights; "
                "give a GGUF in F16, BF16 or F32, or the Hugging Face folder"
            )
        key = Key(f"{name}.{kind}", tuple(int(n) for n in reversed(tensor.shape)), dtype)
        offset = int(tensor.data_offset)
        if offset + key.nbytes > size:
            raise SourceError(f"{path}: truncated: {tensor.name} ends at byte {offset + key.nbytes} of {size}")
        if key.name in stored:
            raise SourceError(f"{path}: {short(tensor.name)} is there twice")
        stored[key.name] = _Stored(key, offset, _heads(path, arch, key, heads, shared))
    return dict(sorted(stored.items(), key=lambda item: item[1].offset))


def _heads(path: Path, arch: str, key: Key, heads: int, shared: int) -> int:
    if arch not in _PERMUTED or ".self_attn." not in key.name:
        return 0
    count = heads if ".q_proj." in key.name else shared if ".k_proj." in key.name else 0
    if count and (not key.shape or key.rows % (2 * count)):
        raise SourceError(f"{path}: {key.name} has {key.rows} rows for {count} heads")
    return count if key.rows else 0


def _names(arch: str, blocks: int) -> dict[str, str]:
    """GGUF name -> Hugging Face's, both without .weight, from the library's tables."""
    import gguf

    (kind,) = (k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table = gguf.get_tensor_name_map(kind, blocks)
    found: dict[str, str] = {}
    for name in (*_OUTSIDE, *(f"model.layers.{i}.{part}" for i in range(blocks) for part in _BLOCK)):
        if (stem := table.get_name(name)) is not None:
            found.setdefault(stem, name)
    for part, fused in _FUSED.get(arch, {}).items():
        found = {stem: name.replace(part, fused) for stem, name in found.items()}
    return found


def _read(path: Path) -> Any:
    """The library's reader over the header, strict about the end of the file and the number of values."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise MissingExtra("gguf", "gguf", "reading a GGUF file") from None

    class Strict(gguf.GGUFReader):  # type: ignore[misc]  # the library has no types
        values = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("the header goes beyond the end of the file")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            self.values += 1
            if self.values > _MOST:
                raise ValueError(f"the header holds more than {_MOST:,} values")
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            """Only where each tensor is: its data is read elsewhere, in blocks."""
            self.tensors = list(_tensors(gguf, start_offs, fields))

    try:
        return Strict(path)
    except (ValueError, KeyError, IndexError, OverflowError, OSError, RecursionError, TypeError, MemoryError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise SourceError(f"{path}: not a GGUF file that can be read ({said[:120]})") from None


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    tensor_type: Any
    data_offset: int


def _tensors(gguf: Any, start: int, fields: Any) -> Iterator[_Tensor]:
    for field in fields:
        _, name, _, dims, kind, offset = field.parts
        shape = tuple(int(n) for n in dims)
        if len(shape) > 8 or any(n > 1 << 40 for n in shape):
            raise ValueError(f"shape {shape[:8]} is none that a tensor can have")
        text = str(bytes(name), "utf-8")
        yield _Tensor(text, shape, gguf.GGMLQuantizationType(int(kind[0])), start + int(offset[0]))


def _text(fields: Mapping[str, Any], name: str) -> str:
    field = fields.get(name)
    return "" if field is None else str(bytes(field.parts[-1]), "utf-8", "replace")


def _number(fields: Mapping[str, Any], name: str, path: Path, default: int | None = None, least: int = 1) -> int:
    field = fields.get(name)
    if field is None and default is not None:
        return default
    try:
        value = int(field.parts[-1][0])  # type: ignore[union-attr]  # an absent field is an error, told below
    except (AttributeError, IndexError, TypeError, ValueError):
        raise SourceError(f"{path}: no {name} in the file") from None
    if not least <= value <= 100_000:
        raise SourceError(f"{path}: {name} = {value}, which no model has")
    return value
