"""GGUF files of llama.cpp in F32, F16 or BF16, under the names and in the order that Hugging Face gives the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weightsmith.core.errors import MissingExtra, SourceError
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


class _Stored(NamedTuple):
    """A tensor in the file, under its Hugging Face name."""

    key: Key
    offset: int
    heads: int  # of which the rows are to be put back in order; 0: they are


class GgufSource(Source):
    """One GGUF file.  It has no config.json or tokenizer files: these come from another model of the merge."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.origin = Origin(str(path), locations=(self.path,), lacks=_LACKS)
        self._file = File(self.path)
        self._tensors = _tensors_of(self.path, self._file.size)
        self.keys = {name: stored.key for name, stored in self._tensors.items()}

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Bits:
        key, offset, heads = self._tensors[self.key(name).name]
        width = DTYPES[key.dtype].itemsize
        pitch = key.row_numel * width
        first, last, _ = slice(low, high).indices(key.rows)
        begin, end = (first, last) if not heads else _span(first, last, key.rows // heads)
        rows = max(end - begin, 0)
        data = self._file.read(offset + begin * pitch, rows * pitch, repr(name)).view(f"u{width}")
        found = data.reshape((rows, *key.shape[1:]) if key.shape else ())
        return Bits(found[_order(np.arange(first, last), key.rows // heads) - begin] if heads else found, key.dtype)

    def fingerprint(self) -> dict[str, Any]:
        self._file.refuse_changed()
        return {"files": {self.path.name: {"size": self._file.size, **self._file.stamp()}}}


def _span(first: int, last: int, size: int) -> tuple[int, int]:
    """Whole heads of `size` rows that hold rows first..last."""
    return first // size * size, -(-last // size) * size


def _order(rows: np.ndarray, size: int) -> np.ndarray:
    """Where the file has a row: within a head, row j * size/2 + i of Hugging Face is row 2 i + j there."""
    head, within = np.divmod(rows, size)
    half, i = np.divmod(within, size // 2)
    return np.asarray(head * size + 2 * i + half)


# --- the header ------------------------------------------------------------------------------------


def _tensors_of(path: Path, size: int) -> dict[str, _Stored]:
    found = _read(path)
    arch = _text(found.fields, "general.architecture")
    if arch not in _KNOWN:
        raise SourceError(
            f"{path}: GGUF of architecture {short(arch)}, whose tensors cannot be mapped back; known: "
            f"{', '.join(sorted(_KNOWN))}; give the Hugging Face folder that it was converted from"
        )
    blocks = _number(found.fields, f"{arch}.block_count", path)
    if blocks > len(found.tensors):  # the table of names grows with it
        raise SourceError(f"{path}: {arch}.block_count = {blocks}, but the file has {len(found.tensors)} tensors")
    names = _names(arch, blocks)
    heads = _number(found.fields, f"{arch}.attention.head_count", path)
    shared = _number(found.fields, f"{arch}.attention.head_count_kv", path, heads)
    stored: dict[str, _Stored] = {}
    for tensor in found.tensors:
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


def _number(fields: Mapping[str, Any], name: str, path: Path, default: int | None = None) -> int:
    field = fields.get(name)
    if field is None and default is not None:
        return default
    try:
        value = int(field.parts[-1][0])  # type: ignore[union-attr]  # an absent field is an error, told below
    except (AttributeError, IndexError, TypeError, ValueError):
        raise SourceError(f"{path}: no {name} in the file") from None
    if not 0 < value <= 100_000:
        raise SourceError(f"{path}: {name} = {value}, which no model has")
    return value
