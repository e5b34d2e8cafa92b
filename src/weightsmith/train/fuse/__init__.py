"""Fuse the token distributions of several language models into one (Fusion-X, arXiv 2505.23844).

    from weightsmith.train.fuse import Fusion, Gate, top_k

    fusion = Fusion(Gate(3))                     # train it along: optimizer over student and fusion
    loss = fusion(student_logits, labels, candidates, losses)

The models may have other tokenizers: `align` brings their cached distributions to the target's tokens.  `run` is the
whole from a file, which `recipe` reads; `texts` and `cache` are its data.
"""

from __future__ import annotations

from weightsmith.train.fuse.align import Alignment, map_vocabulary, match, places
from weightsmith.train.fuse.gate import Gate, balance, best, by_loss, rewards, uniform
from weightsmith.train.fuse.loss import Fusion, fused_loss
from weightsmith.train.fuse.topk import TopK, stacked, top_k

__all__ = [
    "Alignment",
    "Fusion",
    "Gate",
    "TopK",
    "balance",
    "best",
    "by_loss",
    "fused_loss",
    "map_vocabulary",
    "match",
    "places",
    "rewards",
    "stacked",
    "top_k",
    "uniform",
]
