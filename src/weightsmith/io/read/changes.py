"""What an adapter does to the tensors of a base, as values."""

from __future__ import annotations

from dataclasses import dataclass, field

from weightsmith.core.keys import Key
from weightsmith.io.read.lora import TokenRows
from weightsmith.io.read.updates import Update

__all__ = ["Change", "Changes"]


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor; the strings are names in the adapter's file.

    replacement  takes the place of the base's tensor (modules_to_save, trained biases)
    rows         rows that take the place of the base's
    update       is added, times `scale`; `flip`: the weight is stored [in, out]
    magnitude    DoRA's length of each output unit, or with `inward` of each input
    bias         is added, times `scale`
    of           the base's tensor that it starts from, where that is another (an output layer that was tied to it)
    """

    replacement: str | None = None
    rows: TokenRows | None = None
    update: Update | None = None
    scale: float = 1.0
    flip: bool = False
    magnitude: str | None = None
    inward: bool = False
    bias: str | None = None
    of: str | None = None

    @property
    def computed(self) -> bool:
        return self.update is not None or self.bias is not None or self.rows is not None


@dataclass
class Changes:
    """All of an adapter's changes, by the base's names.

    tensors  name -> Change; names that the base lacks are new tensors
    keys     of new tensors, and of those that become larger
    untied   output layers that no longer share the embedding's weight
    heads    new tensors of a trained head (classification)
    dropped  the base's tensors that a model with this head does not have
    says     what the user should know
    """

    tensors: dict[str, Change] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    dropped: frozenset[str] = frozenset()
    says: list[str] = field(default_factory=list)
