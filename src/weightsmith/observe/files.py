"""Writing statistics: one safetensors file each, with its story in the header.  `io.stats` reads them."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from weightsmith.errors import OutputError
from weightsmith.io.stats import METADATA

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
    """

    tensors: Mapping[str, Tensor]
    rows: int
    counts: Mapping[str, int] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    transposed: Sequence[str] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)


def stat_path(out: Path, stat: str) -> Path:
    return out / f"{stat}.safetensors"


def write_statistic(out: Path, stat: str, statistic: Statistic, story: Mapping[str, Any]) -> Path:
    """Write OUT/STAT.safetensors in one visible step; `__metadata__["weightsmith"]` is a JSON object."""
    from safetensors.torch import save_file

    metadata = {
        "stat": stat,
        **story,
        "rows": statistic.rows,
        "counts": dict(statistic.counts),
        "aliases": dict(statistic.aliases),
        "transposed": list(statistic.transposed),
        "skipped": [{"name": name, "reason": reason} for name, reason in statistic.skipped.items()],
        "version": importlib.metadata.version("weightsmith"),
    }
    final = stat_path(out, stat)
    partial = out / f".{final.name}.{os.getpid()}.partial"
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            save_file(dict(statistic.tensors), partial, metadata={METADATA: json.dumps(metadata)})
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(final)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{final}: cannot be written ({error.strerror or error})") from error
    return final
