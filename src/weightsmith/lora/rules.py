"""How adapters become one adapter: the combinations of peft's add_weighted_adapter, KnOTS, and averages over a run.

With adapters i of weight w_i and scale c_i (alpha / r, or alpha / sqrt(r)), Delta_i = c_i B_i A_i:

    cat        B = [B_1 | B_2 ...], A = [w_1 c_1 A_1; ...]: exactly sum_i w_i Delta_i, at the sum of the ranks
    svd        the best approximation of that sum at one rank
    linear     A = sum_i sgn(w_i) sqrt|w_i c_i| A_i, B = sum_i sqrt|w_i c_i| B_i: has cross terms B_i A_j
    ties, dare_linear, dare_ties, magnitude_prune    their rule on the A and on the B, weighted as in linear
    *_svd      the rule on the Delta_i in full, then the best approximation at one rank

The result has scale 1.  An adapter that lacks a module counts as zero there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from weightsmith.core.checks import Case, Verdict, refuse
from weightsmith.core.errors import RecipeError, did_you_mean
from weightsmith.core.lazy import torch
from weightsmith.core.method import Each, Stage, Traits, choice, number, registry
from weightsmith.core.site import Site
from weightsmith.methods.knots import Knots
from weightsmith.methods.mwa import Mwa
from weightsmith.ops.combine import weigh, weighted_sum
from weightsmith.ops.lowrank import (
    VOTES,
    Factors,
    agreed_mean,
    clamped,
    drop,
    prune,
    rank_for,
    signed,
    split,
    stacked,
    svd_of_factors,
    widened,
)
from weightsmith.ops.spectral import Svd, top_svd

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KINDS", "METHODS", "Averaged", "Combine", "Made", "Part", "Rule", "SharedBasis", "named"]


@dataclass(frozen=True)
class Rule:
    """What a combination does: on the factors side by side, on each factor, or on the full product; and how."""

    on: str = "factors"  # stack, factors, product
    prune: str = ""  # magnitude, random
    vote: bool = False
    svd: bool = False


KINDS: Mapping[str, Rule] = {
    "cat": Rule("stack"),
    "svd": Rule("stack", svd=True),
    "linear": Rule(),
    "ties": Rule(prune="magnitude", vote=True),
    "ties_svd": Rule("product", "magnitude", vote=True, svd=True),
    "dare_linear": Rule(prune="random"),
    "dare_linear_svd": Rule("product", "random", svd=True),
    "dare_ties": Rule(prune="random", vote=True),
    "dare_ties_svd": Rule("product", "random", vote=True, svd=True),
    "magnitude_prune": Rule(prune="magnitude"),
    "magnitude_prune_svd": Rule("product", "magnitude", svd=True),
}


def _or_word(word: str, help: str, **limits: Any) -> Any:
    """A number field whose default is a word."""
    return number(word, help, options=(word,), **limits)


@dataclass(frozen=True, eq=False)
class Part:
    """What one adapter has for a module: its factors, its scale, its weight, and its name."""

    factors: Factors
    scale: float
    weight: float
    who: str

    @property
    def strength(self) -> float:
        """w_i c_i."""
        return self.weight * self.scale


class Made(NamedTuple):
    """The factors made, the matrix that they stand for, and the share of its squared singular values they keep."""

    factors: Factors
    wanted: Factors | Tensor
    energy: float = 1.0


@dataclass(frozen=True)
class Combine(Stage):
    """One of peft's combinations (`kind`), with what it takes."""

    kind: str = "svd"
    weight: Each = number(1.0, "weight of each adapter; negative takes away what it learnt", each=True)
    density: Any = _or_word("none", "share of the entries kept", low=0, high=1)
    vote: str = choice("total", "whose sign wins: of the sum, of the signs' sum, or of the weighted sum", *VOTES)
    rank: Any = _or_word("auto", "of the result; auto: the largest of the adapters", low=1, kind="integer")
    clamp: Any = _or_word("none", "clip the factors at this quantile of their magnitudes", low=0, high=1)
    saved: str = choice("refuse", "what to do with tensors that several adapters keep in full", "refuse", "average")

    traits = Traits(name="adapters", paper="peft's add_weighted_adapter; arXiv:2106.09685")

    @property
    def name(self) -> str:
        return self.kind

    @property
    def apart(self) -> bool:
        """Whether A and B are combined by themselves, where the sum of the changes is meant."""
        return self.kind == "linear"

    @property
    def rule(self) -> Rule:
        return KINDS[self.kind]

    def check(self, case: Case) -> Iterable[Verdict]:
        rule = self.rule
        if rule.prune and self.density == "none":
            return refuse(f"{self.kind} needs a density: the share of the entries that it keeps, in [0, 1]")
        unused = {
            "density": not rule.prune and self.density != "none",
            "vote": not rule.vote and self.vote != "total",
            "rank": not rule.svd and self.rank != "auto",
            "clamp": not rule.svd and self.clamp != "none",
        }
        for field, wrong in unused.items():
            if wrong:
                able = [name for name, other in KINDS.items() if _uses(other, field)]
                return refuse(f"{self.kind} takes no {field}; it is for {', '.join(able)}")
        return ()

    def combine(self, parts: Sequence[Part], module: str, seed: int, limit: int) -> Made:
        """The combination of one module; `limit` is the rank that `auto` stands for."""
        if self.rule.on == "factors":
            roots = [math.sqrt(abs(part.strength)) for part in parts]
            turned = [math.copysign(root, part.strength) for root, part in zip(roots, parts, strict=True)]
            a = self._joined([p.factors.a for p in parts], turned, parts, f"{module}.lora_A", seed)
            b = self._joined([p.factors.b for p in parts], roots, parts, f"{module}.lora_B", seed)
            found = Factors(b, a)
            if self.kind != "linear":
                return Made(found, found)
            return Made(found, stacked([part.factors for part in parts], [part.strength for part in parts]))
        if self.rule.on == "stack":
            found = stacked([part.factors for part in parts], [part.strength for part in parts])
            return self._cut(svd_of_factors(found), found, limit) if self.rule.svd else Made(found, found)
        deltas = [part.factors.product * part.scale for part in parts]
        full = self._joined(deltas, [part.weight for part in parts], parts, module, seed)
        rank = limit if self.rank == "auto" else self.rank
        return self._cut(signed(top_svd(full, min(rank, *full.shape))), full, limit)

    def _joined(
        self, tensors: list[Tensor], weights: Sequence[float], parts: Sequence[Part], name: str, seed: int
    ) -> Tensor:
        rule = self.rule
        if rule.prune == "magnitude" and self.density < 1:
            tensors = [prune(x, self.density) for x in tensors]
        elif rule.prune == "random" and self.density < 1:
            tensors = [drop(x, self.density, seed, name, p.who) for x, p in zip(tensors, parts, strict=True)]
        stack = torch.stack(tensors)
        return agreed_mean(stack, weights, self.vote) if rule.vote else weighted_sum(weigh(stack, weights))

    def _cut(self, found: Svd, wanted: Factors | Tensor, limit: int) -> Made:
        total = found.s if isinstance(wanted, Factors) else torch.linalg.vector_norm(wanted, dtype=torch.float64)
        square = float(total.square().sum())
        rank = rank_for(found.s, square, rank=limit if self.rank == "auto" else self.rank)
        kept = split(found, rank, even=False)
        kept = widened(kept, max(kept.rank, 1))  # where adapters cancel: a module needs a rank
        if self.clamp != "none":
            kept = clamped(kept, self.clamp)
        return Made(kept, wanted, _share(found.s[:rank], square))


def _uses(rule: Rule, field: str) -> bool:
    return bool({"density": rule.prune, "vote": rule.vote}.get(field, rule.svd))


def _share(s: Tensor, square: float) -> float:
    return min(float(s.square().sum()) / square, 1.0) if square else 1.0


@dataclass(frozen=True)
class SharedBasis(Knots):
    """KnOTS on the adapters' factors; `rank` cuts the result, whose rank is otherwise up to the sum of theirs."""

    rank: Any = _or_word("auto", "of the result; auto: all that there is", low=1, kind="integer")
    saved: str = choice("refuse", "what to do with tensors that several adapters keep in full", "refuse", "average")

    def combine(self, site: Site) -> Made:
        """Of a site whose `factors` have the scales in them; no full matrix is formed."""
        left, right = self.merged(site)
        found = Factors(left.double(), right.double())
        if self.rank == "auto" or self.rank >= found.rank:
            return Made(found, found)
        cut = svd_of_factors(found)
        square = float(cut.s.square().sum())
        rank = rank_for(cut.s, square, rank=self.rank)
        return Made(split(cut, rank, even=False), found, _share(cut.s[:rank], square))


@dataclass(frozen=True)
class Averaged(Stage):
    """Checkpoints of one run, weighted by what the trainer logged for them (`mwa`), or evenly (`average`)."""

    value: Any = _or_word("log", "loss or score of each checkpoint; log: from trainer_state.json", each=True)
    metric: str = choice("loss", "what decides; of a loss the lowest is best", "loss", "steps", "score")
    penalty: float = number(1.0, "how strongly the better ones are preferred (0 not at all)", low=0)
    rule: str = choice("power", "from values to weights", "power", "softmax", "rank")
    source: str = choice("train", "which logged loss", "train", "eval")
    smooth: str = choice("nearest", "the last logged loss, or the mean since the checkpoint before", "nearest", "since")
    space: str = choice("factors", "average A and B by themselves, or their products", "factors", "product")
    rank: Any = _or_word("auto", "with space product; auto: the checkpoints' largest", low=1, kind="integer")

    traits = Traits(name="mwa", paper=Mwa.traits.paper)

    def check(self, case: Case) -> Iterable[Verdict]:
        if self.rank != "auto" and self.space != "product":
            return refuse("mwa takes a rank with space: product only; factors keep theirs")
        if self.value == "log" and self.metric == "score" and self.penalty:
            return refuse("mwa by score needs the value of each checkpoint: value: {checkpoint-100: 0.71, ...}")
        return ()

    def weights(self, values: Sequence[float]) -> tuple[float, ...]:
        """Weights of checkpoints with these metrics, adding up to 1; ask for the `problem` first."""
        spec = self._mwa(values).fused(len(values))
        divisor = math.fsum(spec.weights)
        return tuple(weight / divisor for weight in spec.weights)

    def problem(self, values: Sequence[float]) -> str | None:
        """Why there are no weights for these values."""
        return self._mwa(values).refusal(Case(len(values), has_base=False)) if self.penalty else None

    def _mwa(self, values: Sequence[float]) -> Mwa:
        return Mwa(value=tuple(values), metric=self.metric, penalty=self.penalty, rule=self.rule)

    def combine(self, parts: Sequence[Part], module: str, seed: int, limit: int) -> Made:
        """Of one module.  With space factors the scale stays with the configuration."""
        if self.space == "product":
            return Combine("svd", rank=self.rank).combine(parts, module, seed, limit)
        found = Factors(
            weighted_sum(torch.stack([part.factors.b * part.weight for part in parts])),
            weighted_sum(torch.stack([part.factors.a * part.weight for part in parts])),
        )
        return Made(found, stacked([part.factors for part in parts], [part.weight for part in parts]))

    @property
    def apart(self) -> bool:
        """Whether A and B are combined by themselves."""
        return self.space == "factors"


METHODS: Mapping[str, Callable[..., Combine | SharedBasis | Averaged]] = {
    **{kind: lambda kind=kind, **given: Combine(kind, **given) for kind in KINDS},
    "knots": SharedBasis,
    "mwa": Averaged,
    "average": lambda **given: Averaged(**{"penalty": 0.0, **given}),
}
"""Name in a recipe -> maker of the method from its parameters."""

_CLASSES: Mapping[str, type[Stage]] = {
    **dict.fromkeys(KINDS, Combine),
    "knots": SharedBasis,
    "mwa": Averaged,
    "average": Averaged,
}


def named(method: str) -> type[Stage]:
    """The class that a method's parameters belong to; RecipeError for an unknown name."""
    if method in _CLASSES:
        return _CLASSES[method]
    try:
        registry(method)
    except RecipeError:
        raise RecipeError(f"unknown method {method!r} for adapters{did_you_mean(method, METHODS)}") from None
    raise RecipeError(
        f'{method} merges models, not adapters; run it with "weightsmith merge"{did_you_mean("", METHODS)}'
    )
