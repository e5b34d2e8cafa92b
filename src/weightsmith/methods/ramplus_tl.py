"""RAM with the changes that stand alone made larger where most others are shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from weightsmith.core.lazy import torch
from weightsmith.core.method import BASE, Method, Pass, number
from weightsmith.core.pass_ import State
from weightsmith.core.site import Site
from weightsmith.methods.ram import active, by_sharing

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RamplusTl"]


@dataclass(frozen=True)
class RamplusTl(Method, name="ramplus_tl", needs=(BASE,)):
    """Merge as `ram` does, and enlarge what only one model changed.

    Entries that only model i changed are multiplied by 1 + r min(rho_i, alpha).
    rho_i is the number of entries that model i changed with others, over that of those it changed alone, per
    tensor; with none alone nothing is multiplied.
    """

    paper = "Behavior Knowledge Merge in Reinforced Agentic Models (2026), arXiv:2601.13572, per tensor; as in mergekit"

    epsilon: float = number(1e-5, "size up to which a change counts as none", low=0)
    r: float = number(0.1, "strength of the rescaling", low=0, smooth=True)
    alpha: float = number(0.2, "largest ratio of shared to lone changes that counts", low=0, smooth=True)

    def passes(self, count: int) -> tuple[Pass[Any], ...]:
        return (_Changes(self.epsilon),)

    def merge(self, site: Site) -> Tensor:
        pairs = site.result(_Changes(self.epsilon))
        # 1 + r min(shared / alone, alpha): who shares much is heard more where it stands alone.
        factors = tuple(1 + self.r * min(shared / max(alone, 1), self.alpha) for alone, shared in pairs)
        assert site.base is not None
        return site.base + by_sharing(site.deltas, self.epsilon, factors)


@dataclass(frozen=True)
class _Changes(Pass[list[list[int]]]):
    """Of each model, the entries that only it changed, and those that others changed too."""

    slope: ClassVar[str] = "flat"

    epsilon: float

    def see(self, site: Site) -> State:
        changed, count = active(site.deltas, self.epsilon)
        # integer counts: exact, however the tensor is cut
        found = [[int((c & (count == 1)).sum()), int((c & (count > 1)).sum())] for c in changed]
        return {"changes": torch.tensor(found)}

    def end(self, total: Mapping[str, Any]) -> list[list[int]]:
        found: list[list[int]] = total["changes"].tolist()
        return found
