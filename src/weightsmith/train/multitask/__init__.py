"""Multi-task training: samplers, an optimizer, losses, and systems to compare merges with.

sampler        MultiTaskSampler, the same sequence on all ranks
mtadamw        MTAdamW, task-balanced AdamW
likelihood     losses over candidates
experts        TaskExpertDecoder: shared experts, gates and a memory per task
instruct       instructions, cut to a budget
prompt         SoftPrompt, masked labels, transfer matrix and groups
priors         five classical operators of images
conditioned    `widen`: more input channels with zero weights
soft_tokens    Codebook, mask_augment, expected
recipe, run    `weightsmith train multitask`
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "sampler": ("MultiTaskSampler", "rates_of"),
    "mtadamw": ("MTAdamW",),
    "likelihood": ("Temperature", "candidate_loss", "candidate_scores", "in_batch_loss"),
    "experts": ("TaskExpertDecoder",),
    "instruct": ("Instruction", "Shown", "render"),
    "prompt": ("SoftPrompt", "average_prompts", "masked_labels", "task_groups", "transfer_matrix"),
    "priors": ("background", "coordinates", "gradient", "sauvola", "shading"),
    "conditioned": ("widen",),
    "soft_tokens": ("Codebook", "expected", "mask_augment"),
    "run": ("train_multitask",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'weightsmith.train.multitask' has no attribute {name!r}")
    return getattr(importlib.import_module(f"weightsmith.train.multitask.{_HOME[name]}"), name)
