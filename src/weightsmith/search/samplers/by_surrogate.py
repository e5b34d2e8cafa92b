"""MAP: quadratic surrogates of every goal from few evaluations, then the front that they predict.

Source: "MAP: Low-compute Model Merging with Amortized Pareto Fronts via Quadratic Approximation" (Li et al., ICLR
2025), plain, nested and Bayesian.  Evaluations come first to the fit, the rest goes to points of the predicted front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from weightsmith.core.errors import RecipeError, WeightsmithError, did_you_mean, nearest
from weightsmith.search.fronts import pick
from weightsmith.search.genes import Point
from weightsmith.search.pareto import angles, bin_scores, pareto, spread_over, vector
from weightsmith.search.samplers.base import Sampler, Values, seed_of
from weightsmith.search.surrogate import LINKS, Surrogate, fit, unknowns

__all__ = ["Map"]

Array = NDArray[np.float64]
PAIR = 20
"""Evaluations of a nested problem of two models."""
MANY = 6
"""Models above which nesting takes far fewer evaluations."""
TEMPERATURE, WEIGHT = 0.07, 0.5
WORDS = (*LINKS, "auto")


class Map(Sampler):
    """Fit quadratics to the goals, and evaluate the front that they predict."""

    name = "map"
    punished = False
    options: ClassVar[Mapping[str, Any]] = {
        "points": None, "link": "auto", "rounds": 0, "update": 10, "nested": False, "prefer": None,
    }  # fmt: skip

    @classmethod
    def wanted(cls, option: str, value: Any) -> str | None:
        if option in ("points", "update", "rounds"):
            least = int(option != "rounds")
            good = (type(value) is int and value >= least) or (option == "points" and value is None)
            return None if good else f"a whole number from {least} on"
        if option == "nested":
            return None if isinstance(value, bool) else "true or false"
        words = list(value.values()) if isinstance(value, Mapping) else [value]
        if option == "prefer":
            weights = isinstance(value, Mapping) and all(type(w) in (int, float) and 0 <= w < math.inf for w in words)
            good = value is None or (weights and any(words))
            return None if good else "goal -> a weight from 0 on, one above 0"
        strange = [word for word in words if word not in WORDS]
        return f"one of {', '.join(WORDS)}{nearest(str(strange[0]), WORDS)}" if strange else None

    def begin(self) -> None:
        self.told: list[tuple[list[float], list[float] | None]] = []
        self._fronts: dict[int, tuple[Array, Array]] = {}
        self._pairs: dict[int, tuple[Array, float]] = {}
        self.size = len(self.space.genes)
        for gene in self.space.genes:
            if gene.values or gene.integer:
                raise RecipeError(f"sampler map: {gene.name} is not a number between bounds")
        self.low = np.array([gene.low for gene in self.space.genes])
        self.high = np.array([gene.high for gene in self.space.genes])
        for name in (self.given["link"], self.given["prefer"]):
            for goal in name if isinstance(name, Mapping) else ():
                if goal not in self.goals:
                    raise RecipeError(f"sampler map: unknown goal {goal!r}{did_you_mean(goal, self.goals)}")
        self.nested = bool(self.given["nested"])
        if self.nested:
            self._check_nested()
            return
        wanted = unknowns(self.size)
        count = self.given["points"] or min(2 * wanted, self.budget)
        rounds = self.given["rounds"] * self.given["update"]
        if count < wanted or count + rounds > self.budget:
            raise RecipeError(
                f"sampler map: {count} points, {rounds} more in rounds, {self.budget} evaluations "
                f"for {self.size} genes; a quadratic of so many needs {wanted}, better {2 * wanted}"
            )
        self.first = self._first(count)

    def _check_nested(self) -> None:
        labels = [gene.name.rpartition("/")[2] for gene in self.space.genes]
        if sorted(labels) != sorted(self.goals):
            raise RecipeError("sampler map: nested needs a goal for each model, of the same name, and one gene each; "
                              f"genes {', '.join(labels)}, goals {', '.join(self.goals)}")  # fmt: skip
        self.order = [labels.index(goal) for goal in self.goals]
        wanted = self.size + (self.size - 1) * PAIR + 1
        if self.budget < wanted:
            raise RecipeError(f"sampler map: nested takes {wanted} evaluations for {self.size} models, but there are "
                              f"{self.budget}")  # fmt: skip
        self.first = self._one_hots()

    def _one_hots(self) -> Array:
        return np.clip(np.eye(self.size), self.low, self.high)

    def _first(self, count: int) -> Array:
        """Each model alone, then evenly at random."""
        draw = np.random.default_rng([self.seed, 0])
        more = self.low + draw.random((max(count - self.size, 0), self.size)) * (self.high - self.low)
        return np.concatenate([self._one_hots(), more])[:count]

    # -- asking

    def ask(self, count: int) -> list[dict[str, Any]]:
        found = self._nested_points() if self.nested else self._plain_points()
        points = found[: min(count, self.budget - len(self.told))]
        return [{g.name: float(x) for g, x in zip(self.space.genes, one, strict=True)} for one in points]

    def _plain_points(self) -> Array:
        """The points that come next; they depend on what was told alone."""
        done = len(self.told)
        if done < len(self.first):
            first: Array = self.first[done:]
            return first
        at, update = len(self.first), self.given["update"]
        for number in range(self.given["rounds"]):
            if done < at + update:
                return self._round(at, number)[done - at :]
            at += update
        points, values = self.predicted(at)
        chosen = spread_over(values, max(self.budget - at, 1))
        found: Array = points[chosen][done - at :]
        return found

    def _round(self, upto: int, number: int) -> Array:
        """More points where the surrogates err most, by angle."""
        draw = np.random.default_rng([self.seed, 1, number])
        known, metrics = self._known(upto)
        bins = 4 if self.size < 4 else 2
        phi, _ = angles(np.maximum(known, 0.0))
        made = []
        for i in range(self.given["update"]):
            goal = i % len(self.goals)
            model = self._fit(goal, known, metrics)
            scores = bin_scores(phi, (model(known) - metrics[:, goal]) ** 2, bins, WEIGHT, draw)
            share = np.exp((scores - scores.max()) / TEMPERATURE)
            place = int(draw.choice(len(scores), p=share / share.sum()))
            corner = np.array([place // bins**j % bins for j in range(self.size - 1)], float)
            angle = (corner + draw.random(self.size - 1)) / bins * (math.pi / 2)
            made.append(vector(angle[None], np.array([draw.uniform(0.2, 0.8)]))[0])
        found: Array = np.clip(np.array(made), self.low, self.high)
        return found

    def _known(self, upto: int) -> tuple[Array, Array]:
        """Points and metrics (as the user knows them) that were scored."""
        good = [(x, v) for x, v in self.told[:upto] if v is not None]
        if not good:
            raise RecipeError("sampler map: no candidate could be scored, so there is nothing to fit")
        signs = np.array(self.signs or [1.0] * len(self.goals))
        return np.array([x for x, _ in good]), np.array([v for _, v in good]) * signs

    def _fit(self, goal: int, points: Array, metrics: Array) -> Surrogate:
        try:
            return fit(points, metrics[:, goal], self._link(goal))
        except WeightsmithError as error:
            raise RecipeError(f"sampler map: goal {self.goals[goal]}: {error}") from None

    def _link(self, goal: int) -> str:
        given = self.given["link"]
        word = given.get(self.goals[goal], "auto") if isinstance(given, Mapping) else given
        if word != "auto":
            return str(word)
        if self.goals == ("score",):
            return "identity"
        return "sigmoid" if not self.signs or self.signs[goal] > 0 else "softplus"

    def surrogates(self, upto: int | None = None) -> list[Surrogate]:
        """One for each goal, from what was told."""
        points, metrics = self._known(len(self.told) if upto is None else upto)
        return [self._fit(goal, points, metrics) for goal in range(len(self.goals))]

    def predicted(self, upto: int | None = None) -> tuple[Array, Array]:
        """The predicted front: points, and what is maximised of them."""
        upto = len(self.told) if upto is None else upto
        if upto in self._fronts:
            return self._fronts[upto]
        models, signs = self.surrogates(upto), self.signs or [1.0] * len(self.goals)
        functions = [lambda x, m=m, s=s: s * m(x) for m, s in zip(models, signs, strict=True)]
        self._fronts[upto] = pareto(functions, self.low, self.high, seed_of(self.seed, "front", upto))
        return self._fronts[upto]

    # -- nested

    def _nested_points(self) -> Array:
        """Pairs of groups with the closest metrics, merged two by two."""
        done, at = len(self.told), self.size
        if done < at:
            first: Array = self.first[done:]
            return first
        prefer = {goal: float((self.given["prefer"] or {}).get(goal, 1.0)) for goal in self.goals}
        alone = self._raw(0, at)
        groups = [([g], np.eye(self.size)[self.order[g]], alone[self.order[g]][g]) for g in range(self.size)]
        number = 0
        while len(groups) > 1:
            pairs = [(abs(a[2] - b[2]), i, j) for i, a in enumerate(groups) for j, b in enumerate(groups) if i < j]
            _, i, j = min(pairs)
            basis = np.stack([groups[i][1], groups[j][1]])
            grid = self._pair_grid(number)
            if done < at + PAIR:
                asked: Array = np.clip(grid @ basis, self.low, self.high)[done - at :]
                return asked
            if number not in self._pairs:
                raw = self._raw(at, at + PAIR)
                self._pairs[number] = self._pair(grid, raw, groups[i][0], groups[j][0], prefer, number)
            shares, value = self._pairs[number]
            made = (groups[i][0] + groups[j][0], shares @ basis, value)
            groups = [g for k, g in enumerate(groups) if k not in (i, j)] + [made]
            at, number = at + PAIR, number + 1
        last: Array = np.clip(groups[0][1][None], self.low, self.high)[done - at :]
        return last

    def _raw(self, start: int, stop: int) -> list[Array]:
        signs = np.array(self.signs or [1.0] * len(self.goals))
        return [
            np.full(len(self.goals), np.nan) if v is None else np.array(v) * signs for _, v in self.told[start:stop]
        ]

    def _pair_grid(self, number: int) -> Array:
        draw = np.random.default_rng([self.seed, 2, number])
        return np.concatenate([np.eye(2), draw.random((PAIR - 2, 2))])

    def _pair(
        self,
        grid: Array,
        raw: list[Array],
        first: list[int],
        second: list[int],
        prefer: Mapping[str, float],
        number: int,
    ) -> tuple[Array, float]:
        """The shares of two groups that the preference likes best, and the aggregated metric that is predicted."""
        good = [k for k, row in enumerate(raw) if np.isfinite(row).all()]
        models, weights = [], []
        for tasks in (first, second):
            shares = np.array([prefer[self.goals[t]] for t in tasks])
            total = shares.sum()
            values = np.array([(raw[k][tasks] * shares).sum() / (total or 1.0) for k in good])
            models.append(fit(grid[good], values, self._link(tasks[0])))
            weights.append(float(total))
        sign = self.signs[first[0]] if self.signs else 1.0
        functions = [lambda x, m=m: sign * m(x) for m in models]
        points, values = pareto(functions, np.zeros(2), np.ones(2), seed_of(self.seed, "pair", number))
        best = pick(values, weights)
        return points[best], float(sign * (values[best] * weights).sum() / sum(weights))

    # -- telling

    def tell(self, points: Sequence[Point], values: Sequence[Values]) -> None:
        for point, value in zip(points, values, strict=True):
            vector_ = [float(point[gene.name]) for gene in self.space.genes]
            self.told.append((vector_, None if value is None else list(value)))
            self._refuse_outside(value)

    def _refuse_outside(self, value: Values) -> None:
        """Say at the first score, not at the fit, that a metric is outside its link's range."""
        for goal, one in enumerate(value or ()):
            metric, link = one * (self.signs[goal] if self.signs else 1.0), LINKS[self._link(goal)]
            if not link.low <= metric <= link.high:
                raise RecipeError(
                    f"sampler map: {self.goals[goal]} of {metric:g} is outside the range of link {self._link(goal)}, "
                    f"{link.low:g} to {link.high:g}{link.hint}, or name another link"
                )

    def state(self) -> Any:
        return {"told": self.told}

    def restore(self, state: Any) -> None:
        self.told = [(list(x), None if v is None else list(v)) for x, v in state["told"]]

    def notes(self) -> list[str]:
        """How far the surrogates can be trusted."""
        said = []
        if self.size > MANY and not self.nested:
            said.append(
                f"map: {self.size} genes; with more than {MANY} models nested: true takes far fewer evaluations"
            )
        if self.nested:
            return said
        _, metrics = self._known(len(self.told))
        for goal, model in enumerate(self.surrogates()):
            spread = float(np.std(metrics[:, goal]))
            share = f", {model.error / spread:.0%} of the spread" if spread > 0 and math.isfinite(model.error) else ""
            why = "" if model.converged else "; the fit did not converge, that before the link is used"
            said.append(f"surrogate of {self.goals[goal]} ({model.link}): error on left-out points {model.error:.3g}"
                        f"{share}{why}")  # fmt: skip
        return said
