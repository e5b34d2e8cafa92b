"""CMA-ES, by the package cmaes; the whole state is JSON.

Source: "The CMA Evolution Strategy: A Tutorial" (Hansen, 2016); of more than 100 genes the separable one (Ros & Hansen,
2008), whose covariance is a diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from weightsmith.core.errors import MissingExtra
from weightsmith.search.genes import Point
from weightsmith.search.samplers.base import Sampler, Values, seed_of

__all__ = ["SEPARABLE", "Cmaes"]

SEPARABLE = 100
"""Genes above which the covariance is a diagonal."""


class Cmaes(Sampler):
    """Covariance matrix adaptation; genes are moved in shares of their range."""

    name = "cmaes"
    fronts = False
    options: ClassVar[Mapping[str, Any]] = {"sigma": 1 / 6, "population": None}

    @classmethod
    def wanted(cls, option: str, value: Any) -> str | None:
        if option == "population":
            return None if value is None or (type(value) is int and value >= 2) else "a whole number from 2 on"
        return super().wanted(option, value)

    def begin(self) -> None:
        try:
            import cmaes
        except ImportError:
            raise MissingExtra("cmaes", "search", "sampler cmaes") from None
        genes = self.space.genes
        population = self.given["population"]
        if population is None:
            population = 4 + math.floor(3 * math.log(len(genes)))
        self.batch = population
        # Genes with a link have no bounds, as in mergekit: their sizes count.
        self._free = any(gene.link != "identity" for gene in genes)
        mean = [g.begin if self._free else min(max(g.share(g.begin), 0.01), 0.99) for g in genes]
        bounds = None if self._free else np.array([[0.0, 1.0]] * len(genes))
        self._cma: Any
        options = {"mean": np.array(mean, float), "sigma": float(self.given["sigma"]), "population_size": population}
        if len(genes) == 1:  # the package needs two: the second is looked at by nobody
            options["mean"] = np.array([mean[0], 0.5])
            bounds = None if bounds is None else np.array([[0.0, 1.0]] * 2)
        kind = cmaes.SepCMA if len(genes) > SEPARABLE else cmaes.CMA
        self._cma = kind(**options, bounds=bounds, seed=0)
        self._cma._funhist_values = np.zeros_like(self._cma._funhist_values)  # the package leaves it unset
        self._asked: list[np.ndarray] = []

    def ask(self, count: int) -> list[dict[str, Any]]:
        self._cma._rng = np.random.RandomState(seed_of(self.seed, self._cma.generation))
        self._asked = [self._cma.ask() for _ in range(self.batch)]
        genes = self.space.genes
        if self._free:
            return [{g.name: float(x) for g, x in zip(genes, one[: len(genes)], strict=True)} for one in self._asked]
        return [self.space.at(one[: len(genes)].tolist()) for one in self._asked]

    def tell(self, points: Sequence[Point], values: Sequence[Values]) -> None:
        # It minimises, and looks at the order alone.
        worst = max([-v[0] for v in values if v is not None], default=0.0)
        told = [(x, worst + 1.0 if v is None else -v[0]) for x, v in zip(self._asked, values, strict=False)]
        if len(told) == self.batch:  # the last generation of a budget may be cut short
            self._cma.tell(told)

    def state(self) -> Any:
        return {name: _plain(value) for name, value in vars(self._cma).items() if name != "_rng"}

    def restore(self, state: Any) -> None:
        for name, value in state.items():
            before = vars(self._cma).get(name)
            array = isinstance(before, np.ndarray) or (isinstance(value, dict) and "array" in value)
            setattr(self._cma, name, np.array(value["array"], float) if array and value is not None else value)


def _plain(value: Any) -> Any:
    """As JSON holds it, exactly: Python's texts of floats round-trip."""
    if isinstance(value, np.ndarray):
        return {"array": value.tolist()}
    return value.item() if isinstance(value, np.generic) else value
