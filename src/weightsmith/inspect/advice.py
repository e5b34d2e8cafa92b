"""Which methods the figures speak for: one table of rules, each with its threshold and where that is from.

A rule reads one figure of the whole model, and the same without embeddings and output layers: they may be half of a
small model, and what only they do is said as that.  A threshold is of one of three kinds, and the advice says which:
published (a paper's finding on the paper's models), measured (seen on small models), heuristic (our own judgement of
where a figure stops being what independent task vectors would give).  No rule replaces a validation set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weightsmith.inspect.facts import Measures, pairs

__all__ = ["RULES", "Advice", "Rule", "advise"]

Figure = Callable[[Measures], float | None]


@dataclass(frozen=True)
class Advice:
    """One sentence, the rule that it comes from and the figure that met it.

    methods  what it speaks for; empty if it only warns
    rule     'mean |cos| < 0.1'
    source   kind and origin of the threshold
    """

    text: str
    methods: tuple[str, ...]
    rule: str
    value: float
    source: str


@dataclass(frozen=True)
class Rule:
    """Holds if above <= figure < below.

    name    of the figure, as it is shown
    says    what follows; {words} are those of `_words`
    source  where the threshold is from
    unit    '%': shares; 'x': ratios; '': plain numbers
    """

    name: str
    figure: Figure
    says: str
    source: str
    above: float = -math.inf
    below: float = math.inf
    unit: str = ""
    methods: tuple[str, ...] = ()

    @property
    def condition(self) -> str:
        """'0.1 <= mean |cos| < 0.5'"""
        low = f"{_shown(self.above, self.unit)} <= " if self.above > -math.inf else ""
        high = f" < {_shown(self.below, self.unit)}" if self.below < math.inf else ""
        return f"{self.name} >= {_shown(self.above, self.unit)}" if low and not high else f"{low}{self.name}{high}"

    def holds(self, model: Measures) -> bool:
        value = self.figure(model)
        return value is not None and self.above <= value < self.below

    def on(self, model: Measures, experts: Sequence[str], where: str = "", but: str = "") -> Advice:
        """What the rule says of a model for which it holds.

        where   of which tensors the figure is; '' of all
        but     what is said in place of what follows
        """
        value = self.figure(model)
        assert value is not None
        shown = _shown(value, self.unit)
        high = f" < {_shown(self.below, self.unit)}" if self.below < math.inf else ""
        low = f" >= {_shown(self.above, self.unit)}" if self.above > -math.inf else ""
        figure = f"{self.name}{where} = {shown}{low}{' and' if low and high else ''}{high}"
        text = f"{figure}: {but or self.says.format(**_words(model, experts))}"
        return Advice(text, () if but else self.methods, self.condition, value, self.source)


def advise(model: Measures, experts: Sequence[str], inside: Measures | None = None) -> tuple[Advice, ...]:
    """What every rule that holds says, in the order of the table; the first alone where no expert changed anything.

    inside   figures without embeddings and output layers; None where there are no such tensors, or no others
    """
    rules = RULES if any(model.norm) else RULES[:1]
    if inside is None or not any(inside.norm):
        return tuple(rule.on(model, experts) for rule in rules if rule.holds(model))
    elsewhere = {rule.name for rule in rules if rule.holds(inside)}
    found = []
    for rule in rules:
        if rule.holds(model) and (rule.holds(inside) or rule.figure(inside) is None):
            found.append(rule.on(model, experts))
        elif rule.holds(inside):
            found.append(rule.on(inside, experts, _INSIDE))
        elif rule.holds(model) and rule.name not in elsewhere:
            shown = _shown(rule.figure(inside) or 0.0, rule.unit, digits=3)
            found.append(rule.on(model, experts, but=f"but {shown}{_INSIDE}, so it says little of the other tensors"))
    return tuple(found)


_INSIDE = " without embeddings and output layer"


# --- figures -----------------------------------------------------------------------------------------


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _largest(values: Sequence[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _cosine(model: Measures) -> float | None:
    return _mean(pairs(model.cosine))


def _still(model: Measures) -> float:
    return float(sum(not norm for norm in model.norm))


def _angle(model: Measures) -> float | None:
    return _mean([abs(v) for v in pairs(model.cosine)])


def _several(figure: Figure) -> Figure:
    """The figure, if there is more than one expert to compare."""
    return lambda model: figure(model) if len(model.norm) > 1 else None


def _spread(model: Measures) -> float | None:
    known = [v for v in model.norm if v]
    return max(known) / min(known) if len(known) > 1 else None


def _along_base(model: Measures) -> float | None:
    return _largest([None if v is None else abs(v) for v in model.base_cosine])


def _against_chance(model: Measures) -> float | None:
    return model.outvoted / model.chance if model.outvoted is not None and model.chance else None


def _kept(model: Measures) -> float | None:
    return _mean(model.spectra.kept) if model.spectra else None


def _by_chance(model: Measures) -> float | None:
    return model.spectra.by_chance if model.spectra else None


# --- words -------------------------------------------------------------------------------------------


_ROUNDING = 1e-9
"""Figures below this are zero but for rounding."""


def _shown(value: float, unit: str, digits: int = 2) -> str:
    if unit == "%":
        return f"{100 * value:.3g}%"
    shown = value if abs(value) > _ROUNDING else 0.0
    return f"{shown:.{digits}g}{unit}"


def _words(model: Measures, experts: Sequence[str]) -> dict[str, str]:
    """What sentences may mention."""
    count = len(experts)
    far = max(range(count), key=lambda i: model.relative[i] or 0.0)
    long = max(range(count), key=lambda i: model.norm[i] or 0.0)
    short = min(range(count), key=lambda i: model.norm[i] or math.inf)
    apart = [(v, i, j) for i, row in enumerate(model.cosine) for j, v in enumerate(row) if j > i and v is not None]
    _, i, j = min(apart, default=(0.0, 0, 0))
    to_one = f" to {model.to_one:.2g} (a sum as long as one task vector)" if model.to_one else ""
    return {
        "far": experts[far],
        "long": experts[long],
        "short": experts[short],
        "still": ", ".join(name for name, norm in zip(experts, model.norm, strict=True) if not norm),
        "pair": f"{experts[i]} and {experts[j]}",
        "lambdas": f"{1 / count:.2g} (the mean){to_one}",
        "independent": _shown(model.chance or 0.0, "%"),
        "n": str(count),
    }


# --- the table ---------------------------------------------------------------------------------------

_HEURISTIC = "heuristic"

RULES: tuple[Rule, ...] = (
    Rule(
        "experts equal to the base",
        _still,
        "the task vector of {still} is zero: it adds nothing to a sum and draws means towards the base; leave it out, "
        "or see whether the right files are named",
        "measured",
        above=1,
    ),
    Rule(
        "experts",
        lambda m: float(len(m.norm)),
        "begin with task_arithmetic, search its lambda, and hold every other method against that and the base; most of "
        "the gain comes with the first few experts",
        "published for language models: arXiv:2511.21437 (on public fine-tunes of 3 to 8 B only task arithmetic "
        "reliably beat the base), arXiv:2509.24244 (the gain of more experts falls about as 1/k)",
        above=2,
        methods=("task_arithmetic",),
    ),
    Rule(
        "largest |tau|/|base|",
        lambda m: _largest(m.relative),
        "{far} moved far from the base; expect every merge to lose much of what the experts learnt. Fine-tune with a "
        "smaller learning rate or fewer steps if you can",
        "measured on small vision transformers, which merged at 2 to 3% and failed further out; 5% is a heuristic",
        above=0.05,
        unit="%",
    ),
    Rule(
        "largest |tau|/|base|",
        lambda m: _largest(m.relative),
        "all experts stay near the base, where task vectors may be added",
        "measured on small vision transformers, which merged at 2 to 3% and failed further out; 5% is a heuristic",
        below=0.05,
        unit="%",
    ),
    Rule(
        "largest |cos(tau, base)|",
        _along_base,
        "a task vector lies along the base itself, as it does if the expert was trained from another model; make sure "
        "that this is the base",
        "heuristic; an unrelated model of the same size has -0.71",
        above=0.5,
    ),
    Rule(
        "largest / smallest |tau|",
        _spread,
        "{long} drowns {short} in a sum; give {long} a smaller weight, or search the weights on validation data",
        _HEURISTIC,
        above=2.0,
        unit="x",
        methods=("task_arithmetic",),
    ),
    Rule(
        "mean |cos|",
        _angle,
        "task vectors are near orthogonal, and adding them disturbs each little; task_arithmetic with a lambda from "
        "{lambdas} is a fair start",
        "published: arXiv:2212.04089 (unlike tasks are close to orthogonal); the range of lambda is a heuristic",
        below=0.1,
        methods=("task_arithmetic",),
    ),
    Rule(
        "mean cos",
        _cosine,
        "experts share a part of what they learnt, which a sum counts up to {n} times; lambda from {lambdas}, or "
        "iso_c, which levels shared directions",
        "heuristic; iso_c: arXiv:2502.04959",
        above=0.1,
        below=0.5,
        methods=("task_arithmetic", "iso_c"),
    ),
    Rule(
        "mean cos",
        _cosine,
        "experts moved much the same way, like runs of one training; average them",
        "published for such runs: arXiv:2203.05482; 0.5 is a heuristic",
        above=0.5,
        methods=("linear", "soup"),
    ),
    Rule(
        "smallest cos",
        lambda m: min(pairs(m.cosine), default=None),
        "{pair} pull against each other, and any sum weakens both; give one of them less weight, or leave it out",
        _HEURISTIC,
        below=-0.1,
    ),
    Rule(
        "outvoted weight mass",
        _several(lambda m: m.outvoted),
        "experts disagree on signs (independent ones of these norms: {independent}); ties elects one sign per weight, "
        "consensus drops weights of few tasks",
        "published: arXiv:2306.01708 (conflicts grow with the number of models); 20% is a heuristic",
        above=0.2,
        unit="%",
        methods=("ties", "consensus"),
    ),
    Rule(
        "outvoted weight mass / by chance",
        _several(_against_chance),
        "signs conflict more than those of independent experts of these norms ({independent} outvoted); an election of "
        "signs decides between them, and a smaller weight for {pair} may do better",
        _HEURISTIC,
        above=1.3,
        unit="x",
        methods=("ties",),
    ),
    Rule(
        "outvoted weight mass / by chance",
        _several(_against_chance),
        "signs agree more than those of independent experts of these norms ({independent} outvoted); an election of "
        "signs has little to do",
        _HEURISTIC,
        below=0.7,
        unit="x",
        methods=("task_arithmetic",),
    ),
    Rule(
        "mean overlap of top-20% masks",
        lambda m: _mean(pairs(m.overlap)),
        "experts changed different weights most (independent ones: 0.11); what trimming keeps of one is mostly its "
        "own, and masks tell experts apart",
        "heuristic; methods: arXiv:2306.01708, arXiv:2405.07813",
        below=0.2,
        methods=("ties", "tall_masks"),
    ),
    Rule(
        "mean overlap of top-20% masks",
        lambda m: _mean(pairs(m.overlap)),
        "experts want the same weights (independent ones: 0.11), so that trimming does not part them; methods that "
        "part singular directions may",
        _HEURISTIC,
        above=0.4,
        methods=("tsvm", "iso_c"),
    ),
    Rule(
        "mean share of |tau|^2 in the top 0.1%",
        lambda m: _mean(m.peak),
        "few very large changes dominate (normal numbers: 1.3%); breadcrumbs drops them, r_tsvm weighs experts by "
        "them; try both ways",
        "heuristic; methods: arXiv:2312.06795, arXiv:2502.06876",
        above=0.1,
        unit="%",
        methods=("breadcrumbs", "r_tsvm"),
    ),
    Rule(
        "mean share of unchanged weights",
        lambda m: _mean(m.zeros),
        "most weights did not change, or by less than their dtype can say; trimming and dropping act on the others "
        "only, so read densities accordingly",
        _HEURISTIC,
        above=0.5,
        unit="%",
    ),
    Rule(
        "largest mean |tau_i| where changed",
        lambda m: _largest(m.size),
        "changes are as small as those that dare was found to thin out without loss",
        "published: arXiv:2311.03099 (most changes of supervised fine-tuning within 0.002)",
        below=0.002,
        methods=("dare",),
    ),
    Rule(
        "largest mean |tau_i| where changed",
        lambda m: _largest(m.size),
        "changes are so large that dare was found to fail even at density 0.9; leave it out",
        "published: arXiv:2311.03099 (changes of about 0.03)",
        above=0.03,
    ),
    Rule(
        "|tau|^2 kept by 1/n of the rank",
        _several(_kept),
        "task vectors have low rank; tsvm keeps nearly all of each in orthogonal directions",
        "published: arXiv:2412.00081 (a tenth of the directions keeps the accuracy); 90% is a heuristic",
        above=0.9,
        unit="%",
        methods=("tsvm", "r_tsvm"),
    ),
    Rule(
        "|tau|^2 kept by 1/n of the rank",
        _several(_kept),
        "task vectors have high rank, and tsvm cuts away most of their squares; judge it by a validation set, not by "
        "this error",
        _HEURISTIC,
        below=0.5,
        unit="%",
    ),
    Rule(
        "singular interference / by chance",
        _several(_by_chance),
        "experts share singular directions; tsvm makes them orthogonal, wudi minimises what they do to each other",
        "heuristic; methods: arXiv:2412.00081, arXiv:2503.08099",
        above=1.5,
        unit="x",
        methods=("tsvm", "wudi"),
    ),
    Rule(
        "singular interference / by chance",
        _several(_by_chance),
        "experts share singular directions hardly more than random ones would; a plain sum loses little by that",
        _HEURISTIC,
        below=1.2,
        unit="x",
        methods=("task_arithmetic",),
    ),
)
