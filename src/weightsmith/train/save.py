"""Folders of a few tensors, written whole or not at all, with a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from weightsmith import __version__
from weightsmith.core.errors import PlanError
from weightsmith.core.keys import Key
from weightsmith.io.disk import write_file
from weightsmith.io.package.manifest import build_manifest, write_manifest
from weightsmith.io.read.source import tensor_to_bits
from weightsmith.io.write.output import FolderSink, check_output

__all__ = ["save_folder", "save_rows"]


def save_folder(
    out: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    made: Mapping[str, Any],
    how: str,
    kind: str,
    name: str = "model",
    texts: Mapping[str, str] | None = None,
    package: Callable[[Path], None] = lambda folder: None,
    overwrite: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write OUT/NAME.safetensors, the texts (file -> content) and weightsmith.json.

    made     plain values: what was asked for
    how      how the tensors were made, in words
    kind     of the folder, as its manifest says it
    package  writes more files into the folder
    notes    more fields of the manifest
    Errors: PlanError with what is wrong with OUT, before anything is written.
    """
    keys = [Key(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()]
    rows = ((n, 0, t) for n, t in tensors.items())

    def more(folder: Path) -> None:
        for file, text in (texts or {}).items():
            write_file(folder / file, text)
        package(folder)

    return save_rows(out, keys, rows, made=made, how=how, kind=kind, name=name, package=more, overwrite=overwrite,
                     notes=notes)  # fmt: skip


def save_rows(
    out: str | Path,
    keys: Sequence[Key],
    rows: Iterable[tuple[str, int, Tensor]],
    *,
    made: Mapping[str, Any],
    how: str,
    kind: str,
    name: str = "model",
    package: Callable[[Path], None] = lambda folder: None,
    overwrite: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """As `save_folder`, of tensors that come in pieces: (name, first row, rows), which make up every key."""
    out = Path(out)
    if problems := check_output(out, (), overwrite, False, 0):
        raise PlanError(problems)
    sink = FolderSink(
        out,
        shard_size=1 << 62,
        identity={"recipe": made, "inputs": {}, "version": __version__},
        overwrite=overwrite,
        weight_name=name,
    )
    sink.begin(keys)
    records = []
    try:
        for tensor, first, piece in rows:
            bits = tensor_to_bits(piece.cpu())
            sink.write(tensor, first, bits)
            last = first + (len(bits) if bits.ndim else 1)
            records.append({"parts": [[tensor, first, last, xxhash.xxh3_128_hexdigest(bits.tobytes())]]})
    except BaseException:
        sink.abort()
        raise
    with sink.finishing() as folder:
        package(folder)
        manifest = build_manifest(
            folder, recipe=made, inputs={}, keys=keys, records=records, made_by={k.name: how for k in keys}, kind=kind
        )
        write_manifest(folder, {**manifest, **(notes or {})})
    return sink.out
