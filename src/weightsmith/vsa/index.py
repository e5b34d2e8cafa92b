"""An index of vectors: brute force over one matrix, in a file that says how the vectors were made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key
from weightsmith.io.disk import replace_file
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.write.layout import plan_shards
from weightsmith.vsa.encode import Encoder

__all__ = ["Hit", "Index"]


@dataclass(frozen=True)
class Hit:
    """One entry that a query found: its name, the cosine, and what was noted with it."""

    name: str
    cosine: float
    note: Any = None


@dataclass(eq=False)
class Index:
    """Entries with their vectors.

    names    of the entries;  vectors [n, dim] float32, of length 1
    schema   of the encoder that made them;  notes: a plain value for each entry, or none
    """

    schema: str
    names: list[str]
    vectors: np.ndarray
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, encoder: Encoder, documents: Mapping[str, Any], notes: Mapping[str, Any] | None = None) -> Index:
        """Encode some documents."""
        vectors = np.empty((len(documents), encoder.dim), np.float32)
        for i, value in enumerate(documents.values()):
            vectors[i] = encoder.encode(value)
        return cls(encoder.schema, list(documents), vectors, dict(notes or {}))

    def __len__(self) -> int:
        return len(self.names)

    def query(self, vector: np.ndarray, count: int = 10) -> list[Hit]:
        """The entries with the largest cosines, the largest first.  One matrix-vector product."""
        return self.best(self.cosines(vector), count)

    def cosines(self, vector: np.ndarray) -> np.ndarray:
        """Of every entry with a vector: [n] float32."""
        if vector.shape != self.vectors.shape[1:]:
            raise SourceError(f"a query of {vector.shape[0]} dimensions in an index of {self.vectors.shape[1]}")
        size = float(np.linalg.norm(vector))
        found: np.ndarray = self.vectors @ (vector / size if size else vector).astype(np.float32)
        return found

    def best(self, cosines: np.ndarray, count: int) -> list[Hit]:
        """The entries of the largest of `cosines`, the largest first."""
        count = min(count, len(cosines))
        if not count:
            return []
        best = np.argpartition(-cosines, count - 1)[:count]
        best = best[np.lexsort((best, -cosines[best]))]
        return [Hit(self.names[i], float(cosines[i]), self.notes.get(self.names[i])) for i in best]

    def joined(self, other: Index) -> Index:
        """Both indexes as one; SourceError where their vectors cannot be compared, or a name is in both."""
        if self.schema != other.schema:
            raise SourceError(_unlike(self.schema, other.schema, "these indexes"))
        if both := set(self.names) & set(other.names):
            raise SourceError(f"{min(both)} is in both indexes")
        vectors = np.concatenate([self.vectors, other.vectors])
        return Index(self.schema, [*self.names, *other.names], vectors, {**self.notes, **other.notes})

    def checked(self, encoder: Encoder, label: str = "this index") -> Index:
        """The index itself; SourceError unless it was made by such an encoder."""
        if self.schema != encoder.schema:
            raise SourceError(_unlike(self.schema, encoder.schema, label))
        return self

    # --- files

    def save(self, path: Path) -> Path:
        """Write one file, in one visible step."""
        listed = json.dumps([self.names, self.notes], ensure_ascii=False).encode("utf-8", "surrogatepass")
        entries = np.frombuffer(listed, np.uint8)
        keys = [Key("vectors", self.vectors.shape, "float32"), Key("entries", entries.shape, "uint8")]
        about = {"format": "pt", "index": self.schema, "hash": _hash(self.schema)}
        (shard,) = plan_shards(keys, 1 << 60, "index", about)
        blocks: dict[str, np.ndarray] = {"vectors": self.vectors, "entries": entries}
        order = sorted(blocks, key=shard.offsets.__getitem__)
        return replace_file(path, (shard.header, *(blocks[name].tobytes() for name in order)))

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read a file of `save`; SourceError for one that is none."""
        file = SafetensorsSource(path)
        about = file.header.metadata
        schema = str(about.get("index", ""))
        if about.get("hash") != _hash(schema) or set(file.keys) != {"vectors", "entries"}:
            raise SourceError(f"{path}: this is no index of weightsmith find; give another --index, or remove it")
        vectors = file.bits("vectors").view(np.float32)
        try:
            names, notes = json.loads(file.bits("entries").tobytes().decode("utf-8", "surrogatepass"))
            fits = len(names) == len(vectors) and isinstance(notes, dict) and vectors.shape[1] == json.loads(schema)[1]
        except (ValueError, TypeError, IndexError, RecursionError):
            fits = False
        if not fits:
            raise SourceError(f"{path}: the index is damaged; remove it, and it is made anew")
        return cls(schema, list(names), vectors, notes)


def _hash(schema: str) -> str:
    return hashlib.sha256(schema.encode()).hexdigest()


_FIELDS = ("version", "dim", "seed", "binder", "weights", "sets", "scales", "gamma", "text")


def _unlike(mine: str, other: str, label: str) -> str:
    try:
        pairs = list(zip(_FIELDS, json.loads(mine), json.loads(other), strict=True))
    except ValueError:
        pairs = []
    said = ", ".join(f"{name} {a} and {b}" for name, a, b in pairs if a != b) or "other settings"
    return f"{label}: vectors of unlike schemas cannot be compared ({said}); make the index anew with --rebuild"
