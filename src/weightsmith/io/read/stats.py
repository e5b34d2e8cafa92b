"""Calibration statistics as sources: one safetensors file per statistic, under the model's tensor names.

    STATS/gram.safetensors, STATS/fisher.safetensors, ...

`__metadata__["weightsmith"]` is JSON: {"stat": "gram", "examples": 256, "rows": 12345, "model": "...",
"aliases": {"...k_proj.weight": "...q_proj.weight"}}; aliases are parameters that share one statistic
(layers that see the same input).  "factored": ["...q_proj.weight"] are matrices >= 0 kept as a product: the file has
NAME.left [rows, rank] and NAME.right [rank, columns].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key
from weightsmith.io import system
from weightsmith.io.architectures import GIVE_PROBABILITIES
from weightsmith.io.read.layers import parsed_config
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.source import Block, Source
from weightsmith.io.read.views import View
from weightsmith.ops.moments import product

__all__ = ["METADATA", "SIDES", "StatsSource", "missing", "open_stats"]

METADATA = "weightsmith"
SIDES = ("left", "right")


def _fit(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    return len(left) == len(right) == 2 and left[1] == right[0]


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
        self._factored = frozenset(map(str, self._field(notes, "factored", list, [])))
        self.keys = self._with_products()
        aliases: dict[str, Any] = self._field(notes, "aliases", dict, {})
        for name, holder in aliases.items():
            if name in self.keys or not isinstance(holder, str) or holder not in self.keys:
                raise SourceError(f"{self}: the alias {name!r} -> {holder!r} does not fit the tensors in the file")
        self.aliases = aliases
        self.origin = replace(self.origin, folder=None, locations=(self.path,), metadata=notes)

    def _with_products(self) -> dict[str, Key]:
        """The file's keys, the parts of a product in one."""
        found = dict(self._file.keys)
        for name in sorted(self._factored):
            left, right = (found.pop(f"{name}.{side}", None) for side in SIDES)
            if left is None or right is None or name in found or not _fit(left.shape, right.shape):
                raise SourceError(f"{self}: {name!r} should be a product of {name}.left and {name}.right, which do "
                                  "not fit; make the statistic anew")  # fmt: skip
            found[name] = Key(name, (left.shape[0], right.shape[1]), "float32")
        return found

    def computes(self, name: str) -> bool:
        return self.key(name).name in self._factored or super().computes(name)

    def read_cost(self, name: str) -> float:
        return float(self.key(name).name in self._factored)  # the term that is added to the sum

    def block(self, name: str, low: int = 0, high: int | None = None, into: np.ndarray | None = None) -> Block:
        if (held := self.key(name).name) not in self._factored:
            return super().block(name, low, high, into)
        left, right = (f"{held}.{side}" for side in SIDES)
        return product(self._file.read(left, low, high).float(), self._file.read(right).float())

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


def missing(stage: str, stat: str, models: Mapping[str, Source]) -> str:
    """The problem that a stage needs a statistic that these models come without, and what to do."""
    needs = f"{stage} needs the statistic {stat!r} of {', '.join(models)}; "
    moments = 'the second moments that the trainer saved ("weightsmith observe MODEL --optimizer FILE", method ota)'
    source = "--optimizer FILE" if stat == "second_moment" else f"--data FILE --stat {stat}"
    how = f'{needs}make it with "weightsmith observe MODEL {source} -o STATS" and add "stats: STATS" to it'
    if stat == "second_moment":
        return how
    for model in models.values():
        config = parsed_config(model)
        name = next(iter(config.get("architectures") or ()), "")
        if not isinstance(name, str) or not name:
            continue
        if config.get("is_encoder_decoder") is True:
            return f"{needs}none can be made of {name}, an encoder with a decoder; take {moments}, or no statistic"
        if stat == "fisher" and not name.endswith(GIVE_PROBABILITIES):
            return (
                f"{needs}a Fisher information is of probabilities, and {name} gives none: merge the models with their "
                "trained heads (BertForSequenceClassification, say); or take regmean, for which encoders are observed "
                f'too ("weightsmith observe MODEL --data FILE --stat gram"), or {moments}'
            )
    return how
