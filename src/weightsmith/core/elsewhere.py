"""Names that people write as methods of models, and that another command takes."""

from __future__ import annotations

__all__ = ["LEARNED", "OF_ADAPTERS", "elsewhere"]

OF_ADAPTERS = ("cat", "dare_linear_svd", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd", "svd", "ties_svd")

LEARNED = (
    "adamerging", "adamerging_pp", "atlas", "concrete", "expert_merging", "expert_merging_pp", "self_positioning",
)  # fmt: skip


def elsewhere(name: str) -> str:
    """What to say where such a name stands among methods of models; '' for other names."""
    if name in LEARNED:
        return (
            f'{name} learns the numbers of a recipe from data; run it with "weightsmith tune" (preset: {name}), which '
            "writes the recipe that has them"
        )
    if name in OF_ADAPTERS:
        return (
            f'{name} combines adapters into one adapter; run it with "weightsmith lora merge", or give the adapters as '
            "models of another method"
        )
    return ""
