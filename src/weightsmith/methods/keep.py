"""Keep a tensor as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.method import Method
from weightsmith.core.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Keep"]


@dataclass(frozen=True)
class Keep(Method, name="keep"):
    """Take the base's tensor, or the first expert's where there is no base.

    Meant for rules and `exclude`.
    """

    def merge(self, site: Site) -> Tensor:
        return site.experts[0] if site.base is None else site.base
