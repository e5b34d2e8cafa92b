"""What is learned, from what, and how: the three parts of a tuning, and presets that give all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightsmith.tune.descent import Descent
from weightsmith.tune.objective import Objective
from weightsmith.tune.registry import Named
from weightsmith.tune.space import Free

__all__ = ["Preset", "Setting"]


@dataclass(frozen=True)
class Setting:
    """A tuning without its data.

    method     the pipeline, as in a recipe; None: the recipe's own
    free       parameter name -> what is learned of it
    objective  what is minimised
    descent    how
    turns      tasks take turns, `descent.accumulate` batches per step; else every step sums one batch of each
    pull       strength of the mean |value - start|, over models summed: keeps the values near their start
    exclude    globs of tensors that keep the base's values
    matrices   all but matrices keep them too
    """

    free: Mapping[str, Free]
    objective: Objective
    descent: Descent = field(default_factory=Descent)
    method: tuple[Any, ...] | None = None
    turns: bool = False
    pull: float = 0.0
    exclude: tuple[str, ...] = ()
    matrices: bool = False


@dataclass(frozen=True)
class Preset(Named):
    """A published system as a value; its fields are its options."""

    @abstractmethod
    def setting(self, models: tuple[str, ...]) -> Setting:
        """The three parts, for these models."""
