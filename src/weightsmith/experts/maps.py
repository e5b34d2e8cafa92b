"""The map from the experts of a mixture to those of the smaller one that was made of it, beside its weights.

    experts/map.safetensors   X.experts.labels [E] int32: the new number of each expert, -1 if it went; where experts
                              were merged also the router's tensors as they were, E rows each, under their names

In a folder of its own, so that no program that reads every file of weights takes it for one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.core.errors import SourceError
from weightsmith.core.lazy import torch
from weightsmith.experts.smaller import Smaller
from weightsmith.io.disk import write_file
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.write.single import file_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAP", "ExpertMap", "read_map", "write_map"]

MAP = "experts/map.safetensors"
_NOTES = "weightsmith"
_LABELS = ".labels"


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """labels: experts' module -> [E] int64; routers: name -> tensor with E rows, of merged experts."""

    labels: Mapping[str, Tensor]
    routers: Mapping[str, Tensor]

    @property
    def counts(self) -> dict[str, int]:
        """Experts' module -> how many there are now."""
        return {name: int(labels.max()) + 1 for name, labels in self.labels.items()}


def write_map(made: Smaller, folder: Path) -> None:
    """Write the map of a smaller mixture into its folder."""
    tensors: dict[str, Tensor] = {}
    for layer in made.layers:
        tensors[f"{layer.stack.name}{_LABELS}"] = torch.tensor(layer.grouping.labels, dtype=torch.int32)
        if layer.merges:
            tensors |= {name: made.original.read(name) for name in layer.stack.router}
    notes = {"by": made.asked.by, "counts": {name: now for name, (_, now) in made.counts.items()}}
    write_file(folder / MAP, file_of(tensors, {_NOTES: json.dumps(notes)}))


def read_map(folder: Path) -> ExpertMap:
    """The map in a folder; SourceError where there is none."""
    path = folder / MAP
    if not path.is_file():
        raise SourceError(f"{folder}: no {MAP}: not made by weightsmith moe shrink")
    source = SafetensorsSource(path)
    labels = {n.removesuffix(_LABELS): source.read(n).long() for n in source.keys if n.endswith(_LABELS)}
    return ExpertMap(labels, {n: source.read(n) for n in source.keys if not n.endswith(_LABELS)})
