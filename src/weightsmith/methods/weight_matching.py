"""Averaging after each expert's MLP hidden units have been permuted onto the reference's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightsmith.core.method import Each, GroupMethod, number
from weightsmith.core.site import Group
from weightsmith.core.symmetry import groups, permute, units
from weightsmith.ops.assign import best_pairing, similarity
from weightsmith.ops.combine import spread, usable_weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WeightMatching"]


@dataclass(frozen=True)
class WeightMatching(GroupMethod, name="weight_matching", checks=(usable_weights,), otherwise="linear"):
    """Reorder the hidden units of every MLP onto the reference's, then average.

    The reference is the base, or the first expert where there is none.  For each expert the permutation P of an
    MLP's hidden units maximises sum_t <A_t, P(B_t)> over its gate, up and down tensors, which is one linear
    assignment (Git Re-Basin, Ainsworth et al., ICLR 2023, with the residual stream held fixed, so that the MLPs
    do not depend on each other).  Permuted experts compute what they computed before.  Tensors outside the MLPs
    are averaged.  Fine-tunes of one base are aligned already: the permutation is then the identity.
    """

    kind = "mlp"
    paper = "arXiv:2209.04836"

    weight: Each = number(1.0, "weight of each model in the average", each=True)

    def merge_group(self, group: Group) -> dict[str, Tensor]:
        """Return every tensor of one MLP, merged."""
        sites = group.sites
        first = next(iter(sites.values()))
        # Which axis of which tensor its hidden units are on.
        (found,) = groups([s.key for s in sites.values()], kind="mlp")
        stacks = {name: site.experts for name, site in sites.items()}  # [n, *shape]
        target = {name: s.base if s.base is not None else stacks[name][0] for name, s in sites.items()}
        weights = spread(self.weight, first.count)
        # One expert at a time: its permuted copy is let go of before the next.
        added: dict[str, Tensor] = {}
        for i in range(first.count):
            moving = {name: stack[i] for name, stack in stacks.items()}
            # Units first: gate and up have them on axis 0 (a fused tensor twice), down on axis 1.
            profit = similarity(
                [units(target[a.name], a, found.size) for a in found.axes],
                [units(moving[a.name], a, found.size) for a in found.axes],
            )
            # Tensors of the group without units (a bias of the output) come in `moving` only.
            for name, tensor in {**moving, **permute(moving, found, best_pairing(profit))}.items():
                own = tensor * weights[i]
                added[name] = added[name] + own if name in added else own
        return {name: total / sum(weights) for name, total in added.items()}
