"""Reduce outputs to digests: of tensors in memory, and of files as they lie on disk."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Part", "digest", "of_folder", "of_tensors", "sketch"]

Part = tuple[str, str, tuple[int, ...], bytes]
"""Name, dtype, shape and bytes of a tensor; of another file its name, '', () and its contents."""

_LEFT_OUT = {"weightsmith.json", "README.md"}
"""Say when and by which version a folder was made."""

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}


def of_tensors(tensors: Mapping[str, Tensor]) -> list[Part]:
    """The parts of a state dict."""
    parts = []
    for name, value in tensors.items():
        flat = value.detach().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        parts.append((name, _WORDS.get(value.dtype, str(value.dtype)), tuple(value.shape), data))
    return parts


def of_folder(folder: Path) -> list[Part]:
    """The tensors of all safetensors files (with the files' names), and the other files; not their metadata."""
    parts: list[Part] = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.suffix == ".safetensors":
            parts += _of_file(name, file.read_bytes())
        elif file.name not in _LEFT_OUT:
            parts.append((name, "", (), file.read_bytes()))
    return parts


def _of_file(file: str, data: bytes) -> Iterator[Part]:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    for name, told in header.items():
        start, stop = told["data_offsets"]
        yield f"{file}:{name}", told["dtype"], tuple(told["shape"]), data[8 + length + start : 8 + length + stop]


def digest(parts: Iterable[Part]) -> str:
    """16 hexadecimal digits over all parts in the order of their names."""
    found = hashlib.sha256()
    for name, dtype, shape, data in sorted(parts):
        found.update(f"{name} {dtype} {list(shape)} {len(data)}\n".encode())
        found.update(data)
    return found.hexdigest()[:16]


_COUNT = 4


def sketch(parts: Iterable[Part], signed: bool = True) -> list[float]:
    """Root mean square of the numbers, and four of their sums under fixed signs: near for outputs that are near.

    signed: False for factors, which a decomposition may return with either sign: sizes alone count then.
    Tensors beyond float16's range are left out: next to them nothing else would count.
    """
    sums, squares, count = np.zeros(_COUNT), 0.0, 0
    for name, dtype, _, data in sorted(parts):
        if dtype not in _DTYPES or not data:
            continue
        values = torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).double().numpy()
        if not np.isfinite(values).all() or np.abs(values).max() > 65504:
            continue
        values = values if signed else np.abs(values)
        signs = np.random.Generator(np.random.PCG64(list(name.encode()))).random((_COUNT, values.size)) < 0.5
        sums += np.where(signs, values, -values).sum(1)
        squares += float((values * values).sum())
        count += values.size
    return [float(f"{value:.7g}") for value in ((squares / max(count, 1)) ** 0.5, *(sums / max(count, 1) ** 0.5))]
