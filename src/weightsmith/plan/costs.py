"""What every stage takes: a table that `make measure` writes, what a plug-in says of itself, or a cautious guess."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from weightsmith.core.costs import Costs
from weightsmith.core.method import Stage
from weightsmith.io import system

__all__ = ["TABLE", "UNKNOWN", "costs_of", "table"]

TABLE = Path(__file__).with_name("costs.json")

UNKNOWN = Costs(scratch=6.0, matrix=6.0, square=6.0, histograms=3, pairs=True)
"""Of a plug-in that says nothing: as much as most of the built-in methods take, or more, and no time."""


@cache
def table() -> Mapping[str, Costs]:
    """Built-in stage -> what was measured for it."""
    return {name: Costs(**row) for name, row in json.loads(system.read_file(TABLE)).items()}


def costs_of(stage: Stage | type[Stage]) -> Costs:
    """What one stage takes."""
    traits = stage.traits
    return traits.costs if traits.costs is not None else table().get(traits.name, UNKNOWN)
