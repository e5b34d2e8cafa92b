"""How two models differ: tensor by tensor, streaming, with sums that do not depend on blocks or threads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from weightsmith.core.keys import Key
from weightsmith.core.settings import DEFAULT, Settings
from weightsmith.engine.compare import Change, Sums, compare_tensors, gathered
from weightsmith.io.read.source import Source

__all__ = ["Difference", "by_layer", "compare"]


@dataclass(frozen=True)
class Difference:
    """Two models against each other.

    changes  tensors that both have in one shape, in the first one's order
    only_a   tensors of the first alone, with shape and dtype; `only_b` of the second
    shapes   tensors whose shapes differ: name, shape there, shape here
    """

    a: str
    b: str
    changes: tuple[Change, ...]
    only_a: tuple[Key, ...] = ()
    only_b: tuple[Key, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def equal(self) -> bool:
        """Whether the models hold the same tensors with the same values in the same dtypes."""
        alone = self.only_a or self.only_b or self.shapes
        return not alone and all(c.same and c.dtypes[0] == c.dtypes[1] for c in self.changes)


def compare(
    a: Source,
    b: Source,
    settings: Settings = DEFAULT,
    **options: Any,
) -> Difference:
    """Compare all tensors of two models, block by block; options change single settings (threads, progress).

    A tied name stands for the tensor that holds its data, so tied and untied models of equal values are equal.
    """
    names = [*a.keys, *(name for name in a.aliases if name in b.keys)]
    both = [name for name in names if name in b.keys or name in b.aliases]
    fitting = [name for name in both if a.key(name).shape == b.key(name).shape]
    held = {*a.keys, *a.aliases}
    return Difference(
        a.origin.label,
        b.origin.label,
        tuple(compare_tensors(a, b, fitting, settings.but(**options))),
        tuple(key for name, key in a.keys.items() if name not in both),
        tuple(key for name, key in b.keys.items() if name not in held),
        tuple((n, a.key(n).shape, b.key(n).shape) for n in both if a.key(n).shape != b.key(n).shape),
    )


def by_layer(changes: Iterable[Change]) -> dict[str, Sums]:
    """Block -> the sums of its tensors, in order of appearance; '' is all that lies outside the blocks."""
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.layer, []).append(change)
    return {layer: gathered(members) for layer, members in found.items()}
