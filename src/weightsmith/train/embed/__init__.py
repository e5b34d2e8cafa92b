"""Train text embeddings for retrieval and similarity at once (CoDiEmb, arXiv 2508.11442).

    from weightsmith.train.embed import RetrievalLoss, SimilarityLoss, TaskBatches

Each task has a loss of its own and batches of its own; `losses` holds them as functions of tensors, `modules` as
losses of Sentence Transformers.
"""

from __future__ import annotations

from weightsmith.train.embed.batches import TaskBatches
from weightsmith.train.embed.gather import gather
from weightsmith.train.embed.losses import info_nce, pearson, pro, rank_kl, similarity
from weightsmith.train.embed.modules import RetrievalLoss, SimilarityLoss

__all__ = [
    "RetrievalLoss",
    "SimilarityLoss",
    "TaskBatches",
    "gather",
    "info_nce",
    "pearson",
    "pro",
    "rank_kl",
    "similarity",
]
