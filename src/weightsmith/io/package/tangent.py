"""What marks a model that was trained in a tangent space: its weights mean something around one point only.

weightsmith.json says `"linearized": true`, with the point: theta_0, as a hash and as the place that it was read from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from weightsmith.core.errors import OutputError
from weightsmith.io.package.manifest import MANIFEST, read_manifest
from weightsmith.io.read.aligned import identified
from weightsmith.io.read.source import Source

__all__ = ["Tangent", "point_of", "tangent_of"]


@dataclass(frozen=True)
class Tangent:
    """The point that a model was linearised around.

    point  its hash, see `point_of`;  model: where it was read from, a folder or hub id
    """

    point: str
    model: str

    def plain(self) -> dict[str, Any]:
        """The fields of weightsmith.json that say so."""
        return {"linearized": True, "expansion": {"point": self.point, "model": self.model}}

    def __str__(self) -> str:
        return f"{self.model} ({self.point[:8]})"


def point_of(source: Source) -> str:
    """A hash that is the same for every copy of a model's files, and for no other model; '' for one in memory."""
    found = identified(source)
    return xxhash.xxh3_128_hexdigest(json.dumps(found, sort_keys=True).encode()) if found else ""


def tangent_of(folder: Path | None) -> Tangent | None:
    """The point that a folder's model was linearised around; None for ordinary models.

    Raises OutputError for a manifest that is damaged: a mark that cannot be read is none that may be passed over.
    """
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    if not manifest.get("linearized"):
        return None
    noted = manifest.get("expansion")
    if not isinstance(noted, Mapping) or not all(isinstance(noted.get(word), str) for word in ("point", "model")):
        raise OutputError(f"{folder / MANIFEST}: says linearized, but not around which point; train it anew")
    return Tangent(str(noted["point"]), str(noted["model"]))
