"""What is learned, from what, and how: the three parts of a tuning, and presets that give all of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weightsmith.core.keys import Key
from weightsmith.inputs.opened import Inputs
from weightsmith.tune.descent import Descent
from weightsmith.tune.objective import Objective
from weightsmith.tune.registry import Named
from weightsmith.tune.space import Free

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ahead", "Found", "Preset", "Setting"]


@dataclass(frozen=True, eq=False)
class Found:
    """What a first tuning has learned, for the one that follows.

    coefficients  parameter -> tensor -> [n] or [n, c]
    keys          the tensors that they belong to
    """

    coefficients: Mapping[str, Mapping[str, Tensor]]
    inputs: Inputs
    keys: Sequence[Key]


@dataclass(frozen=True)
class Ahead:
    """Numbers that look one step ahead: moved once on batches of their own before each step, and put back after it.

    The step itself, on the batches that follow, moves the other numbers.  First order: no gradient goes through the
    move.

    names    parameters
    descent  how they move; the optimizer's moments are kept from step to step
    """

    names: tuple[str, ...]
    descent: Descent


@dataclass(frozen=True)
class Setting:
    """A tuning without its data.

    method     the pipeline, as in a recipe; None: the recipe's own
    free       parameter name -> what is learned of it
    objective  what is minimised
    descent    how
    first      stages that make one model of all models beforehand: it stands in their place
    budget     of each tensor, the models whose numbers are learned, by their gradients at the start; 0: all
    gather     add up the gradients of a step's batches before they are contracted: the memory of one more module, and
               as many fewer passes over the models
    turns      tasks take turns, `descent.accumulate` batches per step; else every step sums one batch of each
    pull       strength of the mean |value - start|, over models summed: keeps the values near their start
    exclude    globs of tensors that keep the base's values
    matrices   all but matrices keep them too
    ahead      of two levels: the numbers of the inner one
    given      parameter -> tensor -> values [n] or [n, c] that are set and not learned
    then       makes of this setting and what it found the tuning that follows, whose result is the result
    """

    free: Mapping[str, Free]
    objective: Objective
    descent: Descent = field(default_factory=Descent)
    method: tuple[Any, ...] | None = None
    first: tuple[Any, ...] = ()
    budget: int = 0
    gather: bool = False
    turns: bool = False
    pull: float = 0.0
    exclude: tuple[str, ...] = ()
    matrices: bool = False
    ahead: Ahead | None = None
    given: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    then: Callable[[Setting, Found], Setting] | None = None


@dataclass(frozen=True)
class Preset(Named):
    """A published system as a value; its fields are its options."""

    @abstractmethod
    def setting(self, models: tuple[str, ...]) -> Setting:
        """The three parts, for these models."""
