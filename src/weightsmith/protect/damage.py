"""What merging with a model does to what it can: scores of merges, by running them."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightsmith.core.errors import PlanError, WeightsmithError
from weightsmith.io import system
from weightsmith.io.disk import gigabytes
from weightsmith.io.read.source import Source
from weightsmith.jobs.api import merge
from weightsmith.observe.data import read_examples
from weightsmith.observe.memory import available_memory
from weightsmith.observe.model import LoadedModel, load_model
from weightsmith.observe.outcomes import outcomes

__all__ = ["METHODS", "Damage", "Score", "Scoring", "damages"]

METHODS: Mapping[str, Sequence[Any]] = {
    "average": ["linear"],
    "task arithmetic, 1/2": [{"task_arithmetic": {"lambda": 0.5}}],
    "TIES": ["ties"],
    "TSV-M": ["tsvm"],
}
"""What is tried, by the name that tables show."""

_HELD = 1.5  # memory of a model that is loaded and run, in sizes in float32


@dataclass(frozen=True)
class Score:
    """Of a model on the data: mean loss per prediction in nats, and the share of right predictions."""

    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Damage:
    """One way to merge, with the model as it is, as the attack restores it, and as it was before it was locked.

    why  what speaks against this way of merging; the scores are then None
    """

    method: str
    partner: str
    given: Score | None
    restored: Score | None
    unlocked: Score | None
    why: str = ""


class Scoring:
    """Scores models on a file of texts or labelled images."""

    def __init__(self, data: Path, first: Path, examples: int, length: int, batch: int) -> None:
        self._data, self._batch = data, batch
        loaded = load_model(first, device="auto")
        self.kind = loaded.kind
        self._examples = read_examples(data, loaded, examples=examples, length=length)
        self.words = loaded.kind == "causal-lm"
        """Whether perplexity, not accuracy, is what counts."""

    def __call__(self, folder: Path) -> Score:
        return self.of(load_model(folder, kind=self.kind, device="auto"))

    def of(self, loaded: LoadedModel) -> Score:
        loss, hits, count = outcomes(loaded, self._examples, self._batch)
        found = float(loss.sum() / count.sum())
        return Score(found if math.isfinite(found) else math.inf, float(hits.sum() / count.sum()))


def damages(
    base: Source,
    given: Source,
    restored: Source | None,
    unlocked: Source | None,
    experts: Mapping[str, Source],
    score: Scoring,
    progress: Callable[[int, int], object] | None = None,
) -> Iterator[Damage]:
    """Merge with the base and with each expert in every way, and score it."""
    partners: list[tuple[str, Source | None]] = [("base", None), *experts.items()]
    done, total = 0, len(partners) * len(METHODS)
    with _room(base) as folder:
        for partner, expert in partners:
            for method, stages in METHODS.items():
                scores: list[Score | None] = []
                why = ""
                for model in (given, restored, unlocked):
                    try:
                        scores.append(None if model is None else _score(stages, base, model, expert, folder, score))
                    except WeightsmithError as error:
                        why = str(error).splitlines()[0]
                        scores.append(None)
                yield Damage(method, partner, scores[0], scores[1], scores[2], why)
                done += 1
                if progress:
                    progress(done, total)


def _score(
    stages: Sequence[Any], base: Source, model: Source, expert: Source | None, folder: Path, score: Scoring
) -> Score:
    models = {"model": model} | ({"expert": expert} if expert is not None else {})
    averaged = stages[0] == "linear"
    models |= {"base": base} if averaged and expert is None else {}
    out = folder / "merged"
    merge(models, stages, None if averaged else base, out, overwrite=True)
    return score(out)


@contextmanager
def _room(base: Source) -> Iterator[Path]:
    """A folder for one merge at a time; PlanError where disk or memory are too small for it."""
    size = sum(key.nbytes for key in base.keys.values())
    held = int(_HELD * 4 * sum(key.numel for key in base.keys.values()))
    with tempfile.TemporaryDirectory(prefix="weightsmith-audit-") as name:
        free, memory = system.call(shutil.disk_usage, name).free, available_memory(torch.device("cpu"))
        if 2 * size > free:
            raise PlanError([
                f"a merge takes {gigabytes(2 * size)} in {Path(name).parent}, and {gigabytes(free)} are free; "
                "set TMPDIR to a larger disk"
            ])  # fmt: skip
        if memory is not None and held > memory:
            raise PlanError([
                f"running a merge takes about {gigabytes(held)} of memory, and {gigabytes(memory)} are there; leave "
                "--data out to see what the attack recovers"
            ])  # fmt: skip
        yield Path(name)
