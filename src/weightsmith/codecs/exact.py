"""Every expert's own tensor, unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.keys import Key, Part
from weightsmith.core.method import StandaloneCodec
from weightsmith.core.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Exact"]


@dataclass(frozen=True)
class Exact(StandaloneCodec, name="exact"):
    """Store each tensor as it is, for small tensors and heads beside another codec.

    What is stored has the output's dtype.
    """

    def parts(self, key: Key, experts: tuple[str, ...]) -> tuple[Part, ...]:
        span = max(key.row_numel, 1)
        return tuple(Part("whole", Key(f"{key.name}::whole.{e}", key.shape, key.dtype), span, e) for e in experts)

    def encode(self, site: Site) -> dict[str, Tensor]:
        # Behind filters and a method it stores the experts, not what those made.
        source = site.origin or site
        return {f"{site.key.name}::whole.{e}": x for e, x in zip(source.names, source.experts, strict=True)}

    def decode(self, parts: Mapping[str, Tensor], base: Tensor, offset: int) -> Tensor:
        # Whole weights: the base takes no part.
        return parts["whole"]
