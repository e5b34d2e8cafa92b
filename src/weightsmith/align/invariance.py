"""The proof of changes of basis: random ones leave the outputs of a small model of the same architecture as they are.

Where entries of queries and keys are turned in pairs, and what a norm behind them lets through, is not taken from a
table: the likely ways are tried, from the freest on, and the first one that keeps the outputs is what the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from weightsmith.align.bases import Attention, Bases, Branch, Hidden, Run, bases
from weightsmith.align.commute import Commutant, Pairing, commutant, dense, refuse_unless_commuting, scales
from weightsmith.align.proof import TOLERANCE, SmallModel, drawn, kind_of, small_model
from weightsmith.core.errors import RecipeError, SourceError
from weightsmith.core.symmetry import permute
from weightsmith.core.turn import Turn, apply_turns
from weightsmith.io.read.source import Source

__all__ = ["Draw", "Known", "Scheme", "attention_turns", "candidates", "hidden_turns", "known"]

Draw = Callable[..., np.random.Generator]
"""(words) -> a generator of its own for them: of a key, or for a proof."""


@dataclass(frozen=True)
class Scheme:
    """What queries and keys of one branch may be multiplied by.

    pairing  of the entries that positions turn, see `commute`
    turned   and width: so many of so many entries are turned in the small model, and the same share in any other
    norm     of a norm behind the projections: 'signs' signs of entries (of both of a pair) and gains, 'gains' only
    """

    pairing: Pairing = "none"
    turned: int = 0
    width: int = 1
    norm: Literal["", "signs", "gains"] = ""

    def commutant(self, branch: Branch) -> Commutant:
        """What commutes with the rotations of a branch, whose heads may be wider than those of the proof."""
        turned, rest = divmod(branch.width * self.turned, self.width)
        if rest:
            raise SourceError(f"{self.turned} of {self.width} entries are turned, which is no share of {branch.width}")
        return commutant(branch.width, turned, self.pairing)


@dataclass(frozen=True)
class Known:
    """What was proved of the architecture of a model, by kind of attention or MLP (see `proof.kind_of`).

    prefix   of names in memory, that kinds do without
    schemes  kind -> for each branch of queries and keys its scheme; None: they stay
    scaled   kind -> which of `Hidden.ups` are scaled, and whether with signs; None: only permuted
    still    kinds whose heads, or units, may not be permuted
    refused  kind -> why nothing of it may be changed
    left     kind -> what of it stays as it is -> why
    """

    prefix: str
    schemes: Mapping[str, tuple[Scheme | None, ...]]
    scaled: Mapping[str, tuple[int, bool] | None]
    still: frozenset[str]
    refused: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def kind(self, one: Attention | Hidden) -> str:
        return kind_of(one.group, self.prefix)

    def refusal(self, one: Attention | Hidden) -> str | None:
        """Why a module may not be changed at all; None: it may."""
        kind = self.kind(one)
        if kind not in self.schemes and kind not in self.scaled and kind not in self.refused:
            return "no block like it is in the small model that proves the others"
        return self.refused.get(kind)


# --- turns -----------------------------------------------------------------------------------------


def attention_turns(
    one: Attention,
    schemes: Sequence[Scheme | None],
    draw: Draw,
    condition: float,
    *,
    qk: bool = True,
    vo: bool = True,
    order: np.ndarray | None = None,
    equal: Sequence[np.ndarray | None] = (),
) -> list[Turn]:
    """Random changes of basis of one attention.

    order  position i holds key-value head order[i] already; default: as they were
    equal  for each branch with a norm, [pairs]: which have equal gains, so that they may be turned
    """
    found: list[Turn] = []
    if vo:
        matrices = [dense(draw(one.module, "vo", i), one.vo.width, condition) for i in range(one.vo.count)]
        found += _both(one.vo, np.stack(matrices), order)
    for number, (branch, scheme) in enumerate(zip(one.qk, schemes, strict=True)):
        if not qk or scheme is None:
            continue
        draws = [draw(one.module, f"qk{number}", i) for i in range(branch.count)]
        if branch.normed:
            same = equal[number] if number < len(equal) else None
            found += _normed(branch, scheme, draws, draw(one.module, f"gains{number}"), condition, order, same)
        else:
            found += _both(branch, _commuting(branch, scheme, draws, condition), order)
    return found


def _commuting(branch: Branch, scheme: Scheme, draws: Sequence[np.random.Generator], condition: float) -> np.ndarray:
    allowed = scheme.commutant(branch)
    found = np.stack([allowed.drawn(draw, condition) for draw in draws])
    for matrix in found:
        refuse_unless_commuting(matrix, allowed)
    return found


def _both(branch: Branch, matrices: np.ndarray, order: np.ndarray | None) -> list[Turn]:
    """A on the first side, A^-T on the second."""
    placed = matrices if order is None or branch.count == 1 else matrices[order]
    back = np.linalg.inv(placed).transpose(0, 2, 1)
    return [*(run.turn(placed) for run in branch.first), *(run.turn(back) for run in branch.second)]


def _normed(
    branch: Branch,
    scheme: Scheme,
    draws: Sequence[np.random.Generator],
    shared: np.random.Generator,
    condition: float,
    order: np.ndarray | None,
    equal: np.ndarray | None,
) -> list[Turn]:
    """Orthogonal matrices that a norm lets through, and gains: g_q r and g_k / r, r equal inside a pair."""
    allowed = scheme.commutant(branch)
    units = [*allowed.pairs, *((entry,) for entry in allowed.free)]

    def spread(numbers: np.ndarray) -> np.ndarray:
        out = np.empty(branch.width)
        for unit, value in zip(units, numbers, strict=True):
            out[list(unit)] = value
        return out

    found: list[Turn] = []
    if scheme.norm == "signs":
        matrices = []
        for draw in draws:
            matrix = np.diag(spread(draw.choice([-1.0, 1.0], len(units))))
            phases = draw.uniform(0, 2 * np.pi, len(allowed.pairs))
            for i, (a, b) in enumerate(allowed.pairs if branch.shared and equal is not None else ()):
                if equal is not None and equal[i]:
                    c, s = np.cos(phases[i]), np.sin(phases[i])
                    matrix[np.ix_((a, b), (a, b))] = [[c, -s], [s, c]]
            refuse_unless_commuting(matrix, allowed)
            matrices.append(matrix)
        found += _both(branch, np.stack(matrices), order)
    if branch.shared:
        r = spread(scales(shared, len(units), condition))
        sides = (r, 1 / r)
    else:
        rows = np.stack([spread(scales(draw, len(units), condition)) for draw in draws])
        rows = rows if order is None else rows[order]
        sides = (rows, 1 / rows)
    for runs, r in zip(branch.gains, sides, strict=True):
        found += [Turn(run.name, 0, 0, r, 0, run.plus) if run.times == 0 else run.turn(r) for run in runs]
    return found


def hidden_turns(
    one: Hidden, scaled: tuple[int, bool] | None, draw: Draw, condition: float, order: np.ndarray | None = None
) -> list[Turn]:
    """Random scales of the hidden units of one MLP: s on the up branch, 1 / s where it is read."""
    if scaled is None:
        return []
    which, signed = scaled
    own = draw(one.module, "mlp")
    s = scales(own, one.group.size, condition)
    s = s * own.choice([-1.0, 1.0], len(s)) if signed else s
    s = s if order is None else s[order]

    def turn(run: Run, numbers: np.ndarray) -> Turn:
        return Turn(run.name, run.axis, run.start, numbers)

    return [*(turn(run, s) for run in one.ups[which]), *(turn(run, 1 / s) for run in one.down)]


# --- the proof -------------------------------------------------------------------------------------


def candidates(branch: Branch) -> list[Scheme]:
    """The ways in which queries and keys may be multiplied, the likeliest first."""
    width = branch.width
    ways: list[tuple[Pairing, int, int]] = [] if branch.turned else [("none", 0, 1)]
    for turned in dict.fromkeys((branch.turned or width, width)):
        if turned % 2 == 0:
            ways += [("half", turned, width), ("interleaved", turned, width)]
    if not branch.normed:
        return [Scheme(*way) for way in ways]
    return [Scheme(*way, norm) for norm in ("signs", "gains") for way in ways]


def known(source: Source) -> Known:
    """What may be changed in a model, proved; see `Known`.

    Raises SourceError where no small model can be built to prove it on, MissingExtra without transformers.
    """
    with small_model(source) as small:
        tried = _Tried(small, bases(small.source))
        tried.settle()
        return Known(
            small.prefix, tried.schemes, tried.scaled, frozenset(tried.still), tried.refused, tried.left
        )  # fmt: skip


_SAID = "a change of basis changes the outputs (by {:.1g} of the largest)"


class _Tried:
    """Schemes by kind, found by running the small model."""

    def __init__(self, small: SmallModel, there: Bases) -> None:
        self.small = small
        self.attentions = {kind_of(one.group, small.prefix): one for one in reversed(there.attentions)}
        self.hidden = {kind_of(one.group, small.prefix): one for one in reversed(there.hidden)}
        self.all: dict[str, list[Attention | Hidden]] = {}
        for one in there.all:
            self.all.setdefault(kind_of(one.group, small.prefix), []).append(one)
        self.seen = set(self.all)
        self.schemes: dict[str, tuple[Scheme | None, ...]] = {}
        self.scaled: dict[str, tuple[int, bool] | None] = {}
        self.still: set[str] = set()
        self.refused: dict[str, str] = {}
        self.left: dict[str, dict[str, str]] = {}

    def settle(self) -> None:
        """The likeliest way of everything first; where that is wrong, each kind by itself."""
        self.schemes = {kind: tuple(candidates(b)[0] for b in one.qk) for kind, one in self.attentions.items()}
        self.scaled = {kind: (0, one.gated) if one.ups and one.gated else None for kind, one in self.hidden.items()}
        whole = self.change(self.seen, None)
        if whole > TOLERANCE or any(one.ups and not one.gated for one in self.hidden.values()):
            for kind in self.attentions:
                self._attention(kind, whole <= TOLERANCE)
            for kind in self.hidden:
                self._hidden(kind, whole <= TOLERANCE)
            kept = self.seen - self.refused.keys()
            if kept and (by := self.change(kept, None)) > TOLERANCE:
                self.refused |= dict.fromkeys(kept, f"{_SAID.format(by)} together with others")

    def _attention(self, kind: str, fine: bool) -> None:
        if fine:
            return
        if (by := self.change([kind], "vo")) > TOLERANCE:
            self.refused[kind] = _SAID.format(by)
            return
        chosen: list[Scheme | None] = [None] * len(self.attentions[kind].qk)
        for number, branch in enumerate(self.attentions[kind].qk):
            ways = [way for way in candidates(branch) if way.norm != "gains" or any(branch.gains)]
            for scheme in ways:
                self.schemes[kind] = tuple(scheme if i == number else None for i in range(len(chosen)))
                if self.change([kind], "qk") <= TOLERANCE:
                    chosen[number] = scheme
                    break
            else:
                why = "a norm behind them lets nothing through" if branch.normed else "no known way keeps scores"
                self.left.setdefault(kind, {})["queries and keys"] = why
        self.schemes[kind] = tuple(chosen)
        self._order(kind, "heads")

    def _hidden(self, kind: str, fine: bool) -> None:
        one = self.hidden[kind]
        if not fine:
            self._order(kind, "hidden units")
        options = [(i, True) for i in range(len(one.ups))] if one.gated else [(0, False)] if one.ups else []
        if fine and one.gated:
            return
        for option in options:
            self.scaled[kind] = option
            if self.change([kind], "mlp") <= TOLERANCE:
                break
        else:
            self.scaled[kind] = None
            if kind in self.still:
                self.refused[kind] = self.left[kind]["hidden units"]

    def _order(self, kind: str, what: str) -> None:
        if (by := self.change([kind], "order")) > TOLERANCE:
            self.still.add(kind)
            self.left.setdefault(kind, {})[what] = f"a permutation changes the outputs (by {by:.1g} of the largest)"

    def change(self, kinds: Iterable[str], part: str | None) -> float:
        """How far the outputs move when all modules of some kinds are changed, or one part of them."""
        random = np.random.default_rng(len(self.seen))
        tensors = dict(self.small.tensors)
        turns: list[Turn] = []
        for kind in sorted(kinds):
            for one in self.all[kind]:
                if isinstance(one, Attention) and part in (None, "qk", "vo"):
                    turns += attention_turns(
                        one, self.schemes[kind], lambda *_: random, 4.0, qk=part != "vo", vo=part != "qk"
                    )
                if isinstance(one, Hidden) and part in (None, "mlp"):
                    turns += hidden_turns(one, self.scaled[kind], lambda *_: random, 4.0)
                if part in (None, "order") and kind not in self.still:
                    tensors |= permute(tensors, one.group, drawn(one.group, random))
        try:
            return self.small.differs(apply_turns(tensors, turns))
        except RecipeError:
            return float("inf")
