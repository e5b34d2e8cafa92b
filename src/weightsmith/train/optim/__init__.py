"""Low-rank optimizers without a singular value decomposition (Modoranu et al., arXiv 2505.17967).

    from weightsmith.train.optim import DCTAdamW

    optimizer = DCTAdamW(model.parameters(), lr=1e-4, rank=128)

The moments live in a subspace of each matrix: the `rank` columns of one fixed cosine basis that hold most of the
gradient.  The basis is shared by all matrices of a size, so the state is 2 n rank numbers and rank indices per matrix.
"""

from __future__ import annotations

from weightsmith.train.optim.dct_adamw import DCTAdamW, state_bytes
from weightsmith.train.optim.projector import Projector
from weightsmith.train.optim.trion import Trion

__all__ = ["DCTAdamW", "Projector", "Trion", "state_bytes"]
