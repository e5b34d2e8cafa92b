"""Calibration statistics as sources: one safetensors file per statistic, under the model's tensor names.

    STATS/gram.safetensors, STATS/fisher.safetensors, ...

`__metadata__["weightsmith"]` is JSON: {"stat": "gram", "examples": 256, "rows": 12345, "model": "...",
"aliases": {"...k_proj.weight": "...q_proj.weight"}}; aliases are parameters that share one statistic
(layers that see the same input).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError
from weightsmith.io import system
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.source import Source
from weightsmith.io.read.views import View

__all__ = ["METADATA", "StatsSource", "how_to_make", "open_stats"]

METADATA = "weightsmith"


class StatsSource(View):
    """One statistic of one model.

    stat      'gram', 'fisher', ...
    examples  how many examples it was taken over
    rows      how many rows (tokens, patches) those were; 0 if not counted
    model     the model it was taken of, as observe was told
    """

    def __init__(self, path: str | Path) -> None:
        self._file = SafetensorsSource(path)
        self.path = self._file.path
        super().__init__(self._file)
        notes = self._notes()
        self.stat: str = self._field(notes, "stat", str)
        self.examples: int = self._field(notes, "examples", int)
        self.rows: int = self._field(notes, "rows", int, 0)
        self.model: str = self._field(notes, "model", str, "")
        aliases: dict[str, Any] = self._field(notes, "aliases", dict, {})
        for name, holder in aliases.items():
            if name in self.keys or not isinstance(holder, str) or holder not in self.keys:
                raise SourceError(f"{self}: the alias {name!r} -> {holder!r} does not fit the tensors in the file")
        self.aliases = aliases
        self.origin = replace(self.origin, folder=None, locations=(self.path,), metadata=notes)

    def fingerprint(self) -> dict[str, Any]:
        return self._file.fingerprint()

    def _notes(self) -> dict[str, Any]:
        text = self._file.header.metadata.get(METADATA)
        if text is None:
            raise SourceError(f"{self}: holds no statistics; make them with: weightsmith observe")
        try:
            notes = json.loads(text)
        except (ValueError, RecursionError):
            notes = None
        if not isinstance(notes, dict):
            raise SourceError(f"{self}: its {METADATA!r} metadata is not a JSON object")
        return notes

    def _field(self, notes: dict[str, Any], field: str, kind: type, default: Any = None) -> Any:
        value = notes.get(field, default)
        if type(value) is not kind:
            raise SourceError(f"{self}: {field!r} in its {METADATA!r} metadata is {value!r}, not {kind.__name__}")
        return value


def open_stats(paths: Iterable[str | Path]) -> dict[str, Source]:
    """Open every statistic in some folders (or files): name of the statistic -> source."""
    found: dict[str, StatsSource] = {}
    for path in map(Path, paths):
        try:
            files = sorted(system.call(list, path.glob("*.safetensors"))) if path.is_dir() else [path]
        except OSError as error:
            raise SourceError(f"{path}: cannot be listed ({error.strerror})") from None
        if not files:
            raise SourceError(f"{path}: no statistics here (no *.safetensors); make them with: weightsmith observe")
        for file in files:
            source = StatsSource(file)
            if source.stat in found:
                raise SourceError(
                    f"{file}: the statistic {source.stat!r} is also in {found[source.stat].path}; give one"
                )
            found[source.stat] = source
    return dict(found)


def how_to_make(stat: str) -> str:
    """What to do where a statistic is missing."""
    source = "--optimizer FILE" if stat == "second_moment" else f"--data FILE --stat {stat}"
    return f'make it with "weightsmith observe MODEL {source} -o STATS" and add "stats: STATS" to it'
