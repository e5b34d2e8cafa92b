"""Rows of a router from prompts: the state that an expert's prompts leave, minus that of what it is not for.

    v_e = s(positive) - s(negative),   row_e = v_e / max(|v_e|, 1e-8)

As in mergekit-moe (arcee-ai/mergekit, `mergekit/moe/router.py`), with padding left out and sums in float64, in an order
that does not depend on that of the prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.lazy import torch
from weightsmith.ops.noise import normal, uniform_bits

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ILL_CONDITIONED", "cheap_embed", "condition", "drawn", "rows", "within_sigmoid"]

ILL_CONDITIONED = 5.0
"""Condition number of a router above which the prompts are too much alike for all experts to be used."""

_TINY = 1e-8

Ids = Sequence[int]


def cheap_embed(embedding: Callable[[int], Tensor], prompts: Sequence[Ids]) -> Tensor:
    """The sum of the embedding rows of all tokens of all prompts, at unit length: [hidden] float64.

    `embedding` gives the row [hidden] of a token.
    """
    counts = Counter(token for prompt in prompts for token in prompt)
    total = torch.stack([count * embedding(token).double() for token, count in sorted(counts.items())]).sum(0)
    return _unit(total)


def rows(positive: Sequence[Tensor], negative: Sequence[Tensor | None]) -> Tensor:
    """Unit rows: one vector (or matrix, a row per layer) per expert each -> [experts, ..., hidden] float32."""
    return torch.stack([
        _unit(plus if minus is None else plus - minus) for plus, minus in zip(positive, negative, strict=True)
    ]).float()  # fmt: skip


def drawn(kind: str, seed: int, name: str, experts: Sequence[str], hidden: int) -> Tensor:
    """Random rows [experts, hidden] of the router called `name`: N(0, 1), or uniform within 1 / sqrt(hidden)."""
    made = []
    for expert in experts:
        if kind == "random":
            made.append(normal(seed, name, expert, "router", 0, hidden))
        else:
            share = uniform_bits(seed, name, expert, "router", 0, hidden) / 2.0**32
            made.append((2 * share - 1) / np.sqrt(hidden))
    return torch.from_numpy(np.stack(made)).float()


def within_sigmoid(matrix: Tensor) -> Tensor:
    """Rows [experts, hidden] short enough for sigmoids of their products with normalised states.

    Such a state is about sqrt(hidden) long, so that a product with a row of length 1 may be far above 17, where float32
    rounds every sigmoid to 1 and the router cannot tell experts apart.  Here it is at most 4: sigmoid(4) = 0.98.
    """
    length: float = 4.0 / matrix.shape[1] ** 0.5
    return length * matrix


def condition(matrix: Tensor) -> float:
    """Largest over smallest singular value of a router [experts, hidden]; 1 for one row, inf for parallel rows."""
    return float(torch.linalg.cond(matrix.double()))


def _unit(vector: Tensor) -> Tensor:
    length: Tensor = vector.norm(dim=-1, keepdim=True)
    return vector / length.clamp_min(_TINY)
