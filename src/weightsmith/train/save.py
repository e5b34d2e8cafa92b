"""Folders of a few tensors, written whole or not at all, with a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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

__all__ = ["save_folder"]


def save_folder(
    out: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    made: Mapping[str, Any],
    how: str,
    kind: str,
    name: str = "model",
    texts: Mapping[str, str] | None = None,
    package: Callable[[Path], Iterable[Path]] = lambda folder: (),
    overwrite: bool = False,
) -> Path:
    """Write OUT/NAME.safetensors, the texts (file -> content) and weightsmith.json.

    made     plain values: what was asked for
    how      how the tensors were made, in words
    kind     of the folder, as its manifest says it
    package  writes more files into the folder and returns their paths
    Errors: PlanError with what is wrong with OUT, before anything is written.
    """
    out = Path(out)
    if problems := check_output(out, (), overwrite, False, 0):
        raise PlanError(problems)
    bits = {n: tensor_to_bits(t.cpu()) for n, t in tensors.items()}
    keys = [Key(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()]
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
        for key in keys:
            sink.write(key.name, 0, bits[key.name])
            digest = xxhash.xxh3_128_hexdigest(bits[key.name].tobytes())
            records.append({"parts": [[key.name, 0, key.rows, digest]]})
    except BaseException:
        sink.abort()
        raise

    def finish(folder: Path) -> list[Path]:
        paths = [*(write_file(folder / file, text) for file, text in (texts or {}).items()), *package(folder)]
        manifest = build_manifest(
            folder, recipe=made, inputs={}, keys=keys, records=records, made_by={k.name: how for k in keys}, kind=kind
        )
        return [*paths, write_manifest(folder, manifest)]

    return sink.finish(finish)
