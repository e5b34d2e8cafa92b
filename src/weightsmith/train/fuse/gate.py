"""Which candidates a sequence learns from: a trained gate, and fixed rules to compare it with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightsmith.core.errors import PlanError, RecipeError

__all__ = ["Gate", "balance", "best", "by_loss", "rewards", "uniform"]


def rewards(losses: Tensor) -> Tensor:
    """exp(-loss) in (0, 1]: float32 [batch, m], of mean losses [batch, m]; nan or inf marks a missing candidate.

    A loss is the mean over a sequence; where tokenizers differ take it per byte of the text, not per token.
    """
    return torch.exp(-losses.float()).nan_to_num(0.0)


class Gate(nn.Module):
    """Weights of m candidates from their losses: an MLP m -> 2 m -> m -> m with GELU, a softmax, and a selection.

    threshold  least probability that is selected; default 3 / (4 m).  Where none reaches it the largest is taken.
               0 mixes all; above 1/2 at most one is left

    The last layer starts at zero, so training starts from the mean.  The published code makes a new random gate in
    every call, which therefore never learns; this one is a module, to be trained and saved along.  After training the
    student does not need it.
    """

    def __init__(self, m: int, threshold: float | None = None) -> None:
        super().__init__()
        self.threshold = 0.75 / m if threshold is None else threshold
        if m < 1 or not 0 <= self.threshold <= 1:
            raise RecipeError(f"a gate needs candidates and a threshold in [0, 1], got {m} and {threshold}")
        self.mlp = nn.Sequential(nn.Linear(m, 2 * m), nn.GELU(), nn.Linear(2 * m, m), nn.GELU(), nn.Linear(m, m))
        nn.init.zeros_(self.mlp[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[-1].bias)  # type: ignore[arg-type]

    def forward(self, losses: Tensor) -> Tensor:
        """Weights [batch, m] that sum to 1, 0 where not selected, from losses [batch, m] (see `rewards`).

        The selection is a constant: gradients flow through the probabilities of the selected.
        """
        there = torch.isfinite(losses)
        if not bool(there.any(-1).all()):
            raise PlanError(["a sequence has no candidate with a finite loss; give the target's own at least"])
        with torch.autocast(losses.device.type, enabled=False):  # rewards that lie close are one in bfloat16
            scores = self.mlp(rewards(losses)).masked_fill(~there, -torch.inf)
        shares = scores.softmax(-1)
        chosen = (shares > self.threshold) & there
        chosen |= ~chosen.any(-1, keepdim=True) & (shares == shares.amax(-1, keepdim=True)) & _first(shares)
        kept: Tensor = shares * chosen
        return kept / kept.sum(-1, keepdim=True)


def _first(shares: Tensor) -> Tensor:
    """Where the first of the largest is: bool [batch, m]."""
    return torch.arange(shares.shape[-1], device=shares.device) == shares.argmax(-1, keepdim=True)


def balance(weights: Tensor) -> Tensor:
    """The squared relative spread of how much each candidate is used: a scalar.

    Var(importance) / (mean^2 + 1e-10), unbiased, importance = sum of weights [batch, m] over the batch; 0 for one
    candidate.  Over one sequence alone it would only punish selection: give it at least 8.
    """
    if weights.shape[-1] == 1:
        return weights.sum() * 0
    importance = weights.sum(0)
    return importance.var() / (importance.mean() ** 2 + 1e-10)


def uniform(losses: Tensor) -> Tensor:
    """Every candidate that is there, alike: weights [batch, m] of losses [batch, m]."""
    there = torch.isfinite(losses).float()
    return there / there.sum(-1, keepdim=True)


def best(losses: Tensor) -> Tensor:
    """The candidate of the least loss alone (MinCE of FuseLLM, arXiv 2401.10491)."""
    return _first(-losses.nan_to_num(torch.inf)).float()


def by_loss(losses: Tensor) -> Tensor:
    """softmax(-loss): a fixed rule in the manner of FuseLLM's AvgCE; its exact weights were not verified."""
    return (-losses.float().nan_to_num(torch.inf)).softmax(-1)
