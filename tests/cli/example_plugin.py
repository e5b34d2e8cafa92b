"""A method of one's own, in a file of one's own: the median of the experts."""

from dataclasses import dataclass

import torch

from weightsmith.method import Method, number


@dataclass(frozen=True)
class Median(Method, name="median"):
    """Take the median of the experts, weight by weight.  stack: [n, *block]."""

    pull: float = number(0.0, "share of the mean that is mixed in", low=0, high=1)

    def merge(self, site):  # type: ignore[no-untyped-def]
        middle = torch.quantile(site.stack, 0.5, dim=0)
        return middle + self.pull * (site.stack.mean(0) - middle)
