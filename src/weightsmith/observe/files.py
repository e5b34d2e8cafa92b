"""Writing statistics: one safetensors file each, with its story in the header.  `io.read.stats` reads them."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from weightsmith.io import system
from weightsmith.io.disk import replace_file, sync_folder, writing
from weightsmith.io.read.stats import METADATA
from weightsmith.io.write.lock import FolderLock
from weightsmith.io.write.single import file_of

__all__ = ["Statistic", "stat_path", "write_statistic"]


@dataclass(frozen=True, eq=False)
class Statistic:
    """A statistic of one model.

    tensors     parameter name -> float32 tensor
    rows        how many tokens or examples went in, padding apart
    counts      gram: name -> rows that entered this tensor
    aliases     name -> the name whose tensor it shares (equal inputs, computed and stored once)
    transposed  weights stored as [in, out] (GPT-2's Conv1D); all others are [out, in]
    skipped     parameter name -> why nothing was observed for it
    factored    matrices that `tensors` holds as NAME.left and NAME.right, whose product they are
    """

    tensors: Mapping[str, Tensor]
    rows: int
    counts: Mapping[str, int] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    transposed: Sequence[str] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    factored: Sequence[str] = ()


def stat_path(out: Path, stat: str) -> Path:
    return out / f"{stat}.safetensors"


def write_statistic(out: Path, stat: str, statistic: Statistic, story: Mapping[str, Any]) -> Path:
    """Write OUT/STAT.safetensors in one visible step; `__metadata__["weightsmith"]` is a JSON object."""
    metadata = {
        "stat": stat,
        **({"factored": list(statistic.factored)} if statistic.factored else {}),
        **story,
        "rows": statistic.rows,
        "counts": dict(statistic.counts),
        "aliases": dict(statistic.aliases),
        "transposed": list(statistic.transposed),
        "skipped": [{"name": name, "reason": reason} for name, reason in statistic.skipped.items()],
        "version": importlib.metadata.version("weightsmith"),
    }
    final = stat_path(out, stat)
    with writing(out):
        system.call(out.mkdir, parents=True, exist_ok=True)
    lock = FolderLock(out / f".{final.name}.lock", final)
    lock.acquire()
    try:
        replace_file(final, file_of(statistic.tensors, {METADATA: json.dumps(metadata)}))
        with writing(final):
            sync_folder(out)
    finally:
        lock.release()
    return final
