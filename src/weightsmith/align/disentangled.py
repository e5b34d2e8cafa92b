"""The disentanglement map of two fine-tuned models in folders, linearised ones or ordinary (arXiv:2305.12827)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from weightsmith.align.disentangle import disentanglement_map
from weightsmith.core.errors import SourceError
from weightsmith.observe.data import batches, read_examples
from weightsmith.observe.model import load_model
from weightsmith.observe.tangent import Linearized

__all__ = ["Disentangled", "disentangled"]


@dataclass(frozen=True, eq=False)
class Disentangled:
    """xi over a grid of both coefficients: [grid, grid], the first model's along the rows; between 0 and 2."""

    grid: np.ndarray
    error: np.ndarray
    linearized: bool

    def at(self, first: float, second: float) -> float:
        """The value at the nearest point of the grid."""
        i, j = (int(np.abs(self.grid - a).argmin()) for a in (first, second))
        return float(self.error[i, j])


def disentangled(
    base: Path,
    models: Sequence[Path],
    data: Sequence[Path],
    *,
    points: int = 9,
    reach: float = 2.0,
    examples: int = 128,
    length: int = 128,
    batch: int = 16,
    device: Any = "auto",
) -> Disentangled:
    """How far two task vectors disturb each other on their data: coefficients from -reach to reach.

    models  two, fine-tuned from `base`, both in its tangent space or neither;  data: of each, in order
    Raises SourceError for models that do not go together.
    """
    if len(models) != 2 or len(data) != 2:
        raise SourceError(f"a map is of two models with data each, not of {len(models)} with {len(data)}")
    start = load_model(base, device=device)
    tuned = [load_model(path, kind=start.kind, device=device) for path in models]
    inner = [one.module for one in tuned]
    linear = [isinstance(module, Linearized) for module in inner]
    if linear[0] != linear[1]:
        raise SourceError(f"{models[linear.index(True)]} is linearised, the other is not; a map is of two of one kind")
    vectors = [_vector(start.module, module, path) for module, path in zip(inner, models, strict=True)]
    taken = [read_examples(path, start, examples=examples, length=length) for path in data]
    fed: list[list[Tensor]] = []
    for path, own in zip(data, taken, strict=True):
        fed.append([])
        for part in batches(own, batch):
            if part.mask is not None:
                raise SourceError(f"{path}: texts of unlike length; give a .txt, which is cut into equal ones")
            fed[-1].append(part.inputs.to(start.device))
    module: nn.Module = inner[0] if linear[0] else start.module
    grid = np.linspace(-reach, reach, points)
    return Disentangled(grid, disentanglement_map(module, vectors, fed, grid.tolist()), linear[0])


def _vector(base: nn.Module, module: nn.Module, path: Path) -> dict[str, Tensor]:
    """The task vector by parameter name; SourceError where the model is no fine-tune of the base."""
    start = {name: p.detach() for name, p in base.named_parameters()}
    if isinstance(module, Linearized):
        if any(not bool((p == start[n]).all()) for n, p in module.origin.named_parameters() if n in start):
            raise SourceError(f"{path}: linearised around another model than the base")
        return {name: delta.detach() for name, delta in module.delta.items()}
    found = {name: p.detach() for name, p in module.named_parameters()}
    if unlike := [n for n in start if n not in found or found[n].shape != start[n].shape]:
        raise SourceError(f"{path}: {unlike[0]} is not that of the base; both are fine-tuned from one")
    return {name: found[name] - start[name] for name in start}
