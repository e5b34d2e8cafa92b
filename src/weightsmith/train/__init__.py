"""Parts for fine-tuning and distillation beside merging: plain torch, for any training loop.

    optim   DCTAdamW, Trion and their projector: low-rank optimizers without an SVD
    svfit   fine-tuning of singular values, whose result is an expert for merges; svfit_peft: as a method of peft
    dmm     distillation of several denoisers into one with a style
    embed   CoDiEmb's losses and batches for embeddings of text
    fuse    one language model from the token distributions of several
    multitask  one model for several tasks: samplers, losses, seven systems

`weightsmith train` is `recipe`, `run` and `loop`; `train fuse` is `fuse.recipe` and `fuse.run`.
A part is imported, and torch with it, when it is asked for.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["dmm", "embed", "fuse", "multitask", "optim", "svfit"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module 'weightsmith.train' has no attribute {name!r}")
    return importlib.import_module(f"weightsmith.train.{name}")
