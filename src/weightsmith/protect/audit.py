"""What a lock is worth: merges with the model, the known attack, what remains of the damage, in figures and words."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.align.bases import Attention, bases
from weightsmith.align.canonical import Canonical, canonical
from weightsmith.align.invariance import known
from weightsmith.core.errors import SourceError, WeightsmithError
from weightsmith.engine.compare import compare_tensors, gathered
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import Source
from weightsmith.protect.damage import Damage, Score, Scoring, damages
from weightsmith.protect.outliers import Outlier, outliers
from weightsmith.protect.refusals import lock_notes

__all__ = ["Attack", "Audit", "audit", "plain_words"]

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Attack:
    """What least squares against the base recover.

    seconds    of the attack
    residual   what the best changes of basis do not explain of the locked weights, relative, root mean square over
               heads' branches: about the size of the model's own change
    distances  'attentions', 'MLPs' -> |model - base| / |base| before the attack, and after it
    moved      heads that stood elsewhere, of how many;  units: the same of hidden units
    error      |restored - unlocked| / |unlocked|, and of the model's own change, where the unlocked model was given
    """

    seconds: float
    residual: float
    distances: Mapping[str, tuple[float, float]]
    moved: tuple[int, int]
    units: tuple[int, int]
    error: tuple[float, float] | None = None


@dataclass(frozen=True)
class Audit:
    """Everything that was found.

    locked    what the model's manifest says of its lock; empty where it says nothing
    failed    why the attack could not be made
    alone     scores of the model, the base, the experts and the unlocked model by themselves
    words     whether scores are perplexities (else accuracies)
    outliers  None: not looked for, as there was nothing to compare with
    """

    model: str
    base: str
    locked: Mapping[str, Any]
    attack: Attack | None
    failed: str = ""
    alone: Mapping[str, Score] = field(default_factory=dict)
    damage: Sequence[Damage] = ()
    words: bool = True
    outliers: Sequence[Outlier] = ()


def audit(
    model: str | Path | Source,
    base: str | Path | Source,
    *,
    experts: Mapping[str, Any] | None = None,
    unlocked: str | Path | Source | None = None,
    data: Path | None = None,
    examples: int = 64,
    length: int = 256,
    batch: int = 8,
    progress: Progress | None = None,
) -> Audit:
    """Attack a model, merge it as it is and as the attack restores it, and look for tensors that are unlike others'.

    experts   other fine-tunes of the base: partners of merges, and what tensors are compared with
    unlocked  the model before it was locked, where its owner asks: then errors are exact
    data      texts or labelled images; without them no merge is made
    Raises SourceError for models that do not go together.
    """
    given, start = _opened(model), _opened(base)
    others = {name: _opened(one) for name, one in (experts or {}).items()}
    truth = None if unlocked is None else _opened(unlocked)
    for source in (given, start, *others.values(), *([truth] if truth is not None else [])):
        source.prepare()
    _refuse_unlike(given, start)
    restored, attack, failed = _attacked(given, start, truth)
    strange = outliers(start, given, others)
    alone: dict[str, Score] = {}
    damage: list[Damage] = []
    words = True
    if data is not None:
        score = Scoring(data, _folder(given), examples, length, batch)
        words = score.words
        named = {"model": given, "base": start, **others, **({"unlocked": truth} if truth is not None else {})}
        alone = {name: score(_folder(source)) for name, source in named.items()}
        damage = list(damages(start, given, restored, truth, others, score, progress))
    return Audit(
        str(given), str(start), lock_notes(given), attack, failed, alone, damage, words, strange
    )  # fmt: skip


def _opened(model: Any) -> Source:
    return model if isinstance(model, Source) else open_source(str(model))


def _folder(source: Source) -> Path:
    if source.origin.folder is None:
        raise SourceError(f"{source}: no folder with a config.json, so the model cannot be scored")
    return source.origin.folder


def _refuse_unlike(model: Source, base: Source) -> None:
    unlike = [n for n, k in base.keys.items() if n not in model.keys or model.key(n).shape != k.shape]
    if len(unlike) == len(base.keys):
        raise SourceError(f"{model} and {base} have no tensor in common; name the base that the model was made from")
    if unlike and not any(n in model.keys for n in unlike):
        return
    if shapes := [n for n in unlike if n in model.keys]:
        name = shapes[0]
        mine, theirs = (list(source.key(name).shape) for source in (model, base))
        raise SourceError(f"{name} is {mine} in {model} and {theirs} in {base}")


def _attacked(model: Source, base: Source, truth: Source | None) -> tuple[Source | None, Attack | None, str]:
    """The restored model and what there is to say about it; or why there is none."""
    began = time.perf_counter()
    try:
        proved = known(model)
        found = canonical(model, base, proved)
    except WeightsmithError as error:
        return None, None, str(error).splitlines()[0]
    if not found.residuals:
        return None, None, f"{model}: no attention and no MLP whose layout is known"
    parts: dict[str, list[str]] = {"attentions": [], "MLPs": []}
    there = bases(model)
    given, start, restored = (packed_like_memory(one) for one in (model, base, found.source))
    for one in there.all:
        if one.module in found.residuals:
            parts["attentions" if isinstance(one, Attention) else "MLPs"] += _matrices(one.names, given)
    distances = {
        what: (_relative(start, given, names), _relative(start, restored, names))
        for what, names in parts.items()
        if names
    }
    wrong_by = None
    if truth is not None:
        names = [name for own in parts.values() for name in own]
        true = packed_like_memory(truth)
        wrong = gathered(compare_tensors(true, restored, names))
        change = gathered(compare_tensors(start, true, names))
        wrong_by = (wrong.relative, (wrong.d2 / change.d2) ** 0.5 if change.d2 else float("inf"))
    seconds = time.perf_counter() - began
    heads = {one.module for one in there.attentions}
    return found.source, Attack(
        seconds, _residual(found), distances, _counted(found, heads, True), _counted(found, heads, False), wrong_by
    ), ""  # fmt: skip


def _matrices(names: Sequence[str], source: Source) -> list[str]:
    return [n for n in names if n in source.keys and len(source.key(n).shape) >= 2]


def _relative(base: Source, other: Source, names: Sequence[str]) -> float:
    return gathered(compare_tensors(base, other, names)).relative


def _residual(found: Canonical) -> float:
    values = [value for own in found.residuals.values() for value in own.values()]
    return float((sum(v * v for v in values) / max(len(values), 1)) ** 0.5)


def _counted(found: Canonical, heads: set[str], attention: bool) -> tuple[int, int]:
    chosen = [counts for name, counts in found.moved.items() if (name in heads) == attention]
    return sum(c[0] for c in chosen), sum(c[1] for c in chosen)


# --- words -----------------------------------------------------------------------------------------


def plain_words(found: Audit) -> list[str]:
    """What the figures say, a sentence or two each."""
    said = []
    if found.locked:
        said.append(f"The model says that it is locked (key hash {str(found.locked.get('key'))[:12]}).")
    else:
        said.append("The model does not say that it is locked.")
    said += _of_merges(found)
    if (attack := found.attack) is not None:
        said.append(
            f"The known attack took {attack.seconds:.1f} s: it put {attack.moved[0]} of {attack.moved[1]} heads back "
            f"into their places, and estimated every change of basis by least squares against {found.base}."
        )
        for what, (before, after) in attack.distances.items():
            said.append(f"It brought the {what} from {before:.3g} to {after:.3g} of the base's norm off the base.")
        if attack.error is not None:
            said.append(
                f"What it restored is {attack.error[0]:.2%} of the unlocked weights away from them, or "
                f"{attack.error[1]:.0%} of what the model had learned."
            )
        said += _of_what_remains(found)
    else:
        said.append(f"The attack could not be made: {found.failed}; that somebody else can is likely.")
    said.append(
        "A lock keeps people and programs that do not look from merging the model.  It does not keep anybody who has "
        "the base from running this attack; nor from using, fine-tuning, pruning or distilling the model as it is.  "
        "The smaller the model's change from its base, the better the attack."
    )
    return said


def _of_merges(found: Audit) -> list[str]:
    first = next((d for d in found.damage if d.given is not None), None)
    if first is None or first.given is None:
        return ["No merge was scored (no --data): what merging does to the model was not measured."]
    alone = _text(found.alone["model"], found.words)
    line = (
        f"Alone the model has {alone}; merged with {first.partner} ({first.method}) {_text(first.given, found.words)}"
    )
    line += f", and unlocked it would have {_text(first.unlocked, found.words)}." if first.unlocked else "."
    return [line]


def _of_what_remains(found: Audit) -> list[str]:
    pairs = [
        (d.given.loss - found.alone["model"].loss, d.restored.loss - found.alone["model"].loss)
        for d in found.damage
        if d.given is not None and d.restored is not None
    ]
    if not pairs:
        return []
    given, restored = (sum(min(max(p[i], 0.0), 1e3) for p in pairs) / len(pairs) for i in (0, 1))
    if given < 0.05:
        return ["Merging does the model no harm to speak of: there is no lock here that stops it."]
    gone = 1 - restored / given
    if gone > 0.9:
        end = "against somebody who knows it, the lock is worth nothing."
    elif gone > 0.5:
        end = "against somebody who knows it, the lock is worth little."
    else:
        end = "what is left may be the change itself, or a cleverer attack away."
    share = f"{max(gone, 0):.0%}"
    return [f"Over all merges the attack takes away {share} of the loss that merging adds: {end}"]


def _text(score: Score, words: bool) -> str:
    return f"perplexity {score.perplexity:.4g}" if words else f"{score.accuracy:.1%} right"
