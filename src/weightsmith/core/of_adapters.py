"""Names of methods that combine adapters into one adapter, and that no method of models has."""

from __future__ import annotations

__all__ = ["OF_ADAPTERS", "of_adapters"]

OF_ADAPTERS = ("cat", "dare_linear_svd", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd", "svd", "ties_svd")


def of_adapters(name: str) -> str:
    """What to say where such a name stands among methods of models; '' for other names."""
    if name not in OF_ADAPTERS:
        return ""
    return (
        f'{name} combines adapters into one adapter; run it with "weightsmith lora merge", or give the adapters as '
        "models of another method"
    )
