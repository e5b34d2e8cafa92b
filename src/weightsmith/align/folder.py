"""The folder of an alignment: index vectors, and which models they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from weightsmith import __version__
from weightsmith.core.keys import Key
from weightsmith.io.package.manifest import build_manifest, write_manifest
from weightsmith.io.read.aligned import FITTED, KIND, ORDERS, group_json, identified
from weightsmith.io.read.source import Source, tensor_to_bits
from weightsmith.io.write.output import FolderSink

if TYPE_CHECKING:
    from weightsmith.align.run import Aligned

__all__ = ["write"]


def write(out: Path, found: Aligned, sources: Sequence[Source], how: Mapping[str, Any], overwrite: bool) -> None:
    """Write an alignment; sources: the moving model and the reference; how: what it was found with, as JSON has it."""
    orders = {name: order.astype(np.int32) for name, order in found.orders.items() if name not in found.splits}
    for name, one in found.splits.items():
        orders |= {f"{name}/merged": one.merged.astype(np.int32), f"{name}/separate": one.separate.astype(np.int32)}
    stored = {name: order.view(np.uint32) for name, order in orders.items()}
    keys = [Key(name, order.shape, "int32") for name, order in orders.items()]
    for name, tensor in (found.fit.tensors if found.fit is not None else {}).items():
        stored[f"{FITTED}{name}"] = tensor_to_bits(tensor)
        keys.append(Key(f"{FITTED}{name}", tuple(tensor.shape), "float32"))
    made = {"moving": str(sources[0]), "reference": str(sources[1]), **how}
    inputs = {name: source.fingerprint() for name, source in zip(("moving", "reference"), sources, strict=True)}
    identity = {"recipe": made, "inputs": inputs, "version": __version__}
    sink = FolderSink(out, shard_size=1 << 40, identity=identity, overwrite=overwrite, weight_name=ORDERS)
    sink.begin(keys)
    records = []
    try:
        for key in keys:
            bits = stored[key.name]
            sink.write(key.name, 0, bits)
            digest = xxhash.xxh3_128_hexdigest(bits.tobytes())
            records.append({"parts": [[key.name, 0, key.rows, digest]]})
    except BaseException:
        sink.abort()
        raise
    with sink.finishing() as folder:
        _package(folder, found, sources, made, inputs, keys, records)


def _package(
    folder: Path,
    found: Aligned,
    sources: Sequence[Source],
    made: Mapping[str, Any],
    inputs: Mapping[str, Any],
    keys: Sequence[Key],
    records: Sequence[Mapping[str, Any]],
) -> None:
    how = {
        k.name: "fitted by least squares" if k.name.startswith(FITTED) else f"found by matching {made['by']}"
        for k in keys
    }
    manifest = build_manifest(folder, recipe=made, inputs=inputs, keys=keys, records=records, made_by=how, kind=KIND)
    notes = {
        "groups": [group_json(group) for group in found.layout.groups if group.name not in found.splits],
        "wider": [group_json(group) for group in found.layout.groups if group.name in found.splits],
        "frozen": dict(found.layout.frozen),
        "moving": identified(sources[0]),
        "reference": identified(sources[1]),
        "objective": [found.before, found.after],
        "distance": list(found.distance),
        "moved": {name: list(counts) for name, counts in found.moved.items()},
        "losses": {} if found.fit is None else {name: list(pair) for name, pair in found.fit.losses.items()},
        "spectrum": {name: list(values) for name, values in found.spectrum.items()},
    }
    write_manifest(folder, {**manifest, "alignment": notes})
