"""The samplers that there are, by name."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.search.samplers.base import Grid, Random, Sampler
from weightsmith.search.samplers.by_cmaes import Cmaes
from weightsmith.search.samplers.by_gradient import FrankWolfe
from weightsmith.search.samplers.by_optuna import Gp, Nsga2, Nsga3, Tpe
from weightsmith.search.samplers.by_surrogate import Map

__all__ = ["SAMPLERS"]

SAMPLERS: Mapping[str, type[Sampler]] = {
    cls.name: cls for cls in (Random, Grid, Tpe, Gp, Nsga2, Nsga3, Cmaes, Map, FrankWolfe)
}
