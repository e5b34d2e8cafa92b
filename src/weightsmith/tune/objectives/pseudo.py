"""Labels that the model gives itself: those of an image, for a changed view of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.tune.objective import Objective, logits_of
from weightsmith.tune.views import Viewed

__all__ = ["Pseudo"]


@dataclass(frozen=True)
class Pseudo(Objective, name="pseudo"):
    """Minimise the cross-entropy of a changed view of an image with what the model says of the image.

    Source: aTLAS (Zhang et al., NeurIPS 2024), test-time adaptation.  Of an image among the surest of its class at the
    start the answer of the start is kept; of the others what the model says now, where it is sure of it.  The mean over
    those images alone; none: 0.  Needs inputs only.  The view: a random part of at least half the image, in its size,
    and perhaps its mirror image, see `tune.views`.

    sure     probability of the first class above which an answer counts
    trusted  images of each class, at most, whose first answers are kept; no more than a tenth of an even share
    """

    collapses: ClassVar[bool] = True
    sure: float = 0.99
    trusted: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sure < 1 or self.trusted < 0:
            raise RecipeError(
                f"pseudo: sure must be in [0, 1) and trusted at least 0; got {self.sure:g}, {self.trusted}"
            )

    def loss(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        if not isinstance(batch, Viewed):
            raise SourceError("pseudo needs two views of every image; run it through weightsmith.tune")
        said, asked = logits_of(outputs).chunk(2)
        wanted = said.detach().float().softmax(dim=-1)
        labels = batch.labels.to(said.device)
        known = labels >= 0
        counts = known | (wanted.amax(dim=-1) > self.sure)
        kept = nn.functional.one_hot(labels.clamp(min=0), wanted.shape[-1]).to(wanted.dtype)
        losses = nn.functional.cross_entropy(asked.float(), torch.where(known[:, None], kept, wanted), reduction="none")
        return (losses * counts).sum() / counts.sum().clamp(min=1)

    def measure(self, outputs: Any, batch: Any, task: str = "") -> Tensor:
        """The same over all images, each with what the model says now: a loss over few would be least over none."""
        said, asked = logits_of(outputs).float().chunk(2)
        return nn.functional.cross_entropy(asked, said.softmax(dim=-1))
