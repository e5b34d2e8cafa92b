"""Weights of adapters that differ from module to module, from a file of coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

from weightsmith.core.errors import PlanError, some
from weightsmith.lora.compare import Adapters, Method
from weightsmith.lora.rules import Combine
from weightsmith.recipe.table import Table, checked, table_of

__all__ = ["weights_by"]

Weights = Callable[[str], Sequence[float]]
"""Module -> a weight of each adapter."""


def weights_by(
    path: str | None, method: Method, adapters: Adapters, modules: Sequence[str], usual: Sequence[float]
) -> Weights:
    """The weights of each module: those of the file (see `recipe.table`, tensor names are MODULE.weight), or the usual.

    Raises PlanError for a file that does not fit.
    """
    if path is None:
        return lambda module: usual
    if not isinstance(method, Combine) or method.kind not in ("cat", "svd", "linear"):
        raise PlanError(["coefficients are weights of the methods cat, svd and linear; use one of them"])
    if whole := [name for adapter in adapters.values() for name in (*adapter.whole, *adapter.rows)]:
        raise PlanError([f"coefficients are for products of two factors alone; {whole[0]} is kept in full"])
    try:
        table = table_of("weight", checked("weight", {"file": path}, path))
    except ValueError as error:
        raise PlanError([f"coefficients: {error}"]) from None
    found = {module: [_one(table, module, label) for label in adapters] for module in modules}
    if missing := [module for module, values in found.items() if None in values]:
        raise PlanError([f"{path} has no coefficients of {some(missing)} (as MODULE.weight)"])
    return lambda module: [float(value) for value in found[module] if value is not None]


def _one(table: Table, module: str, label: str) -> float | None:
    value = table.at(f"{module}.weight", label)
    if value is not None and not isinstance(value, Real):
        raise PlanError([f"{table.label}: {module} has several coefficients; an adapter takes one for each module"])
    return None if value is None else float(value)
