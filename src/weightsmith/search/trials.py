"""Candidates: built, scored and remembered, so that no recipe is scored twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.core.errors import WeightsmithError
from weightsmith.jobs.scratch import Workshop
from weightsmith.recipe.schema import Recipe
from weightsmith.search.score import Scored, Scorer
from weightsmith.search.space import key_of
from weightsmith.study.cache import Ledger, engine, fingerprint

__all__ = ["Asked", "Cost", "Evaluations", "Outcome"]


@dataclass
class Cost:
    """What scoring took: models built and scored by this and earlier runs; seconds of wall time; bytes read."""

    evaluations: int = 0
    failed: int = 0
    repeated: int = 0
    build_seconds: float = 0.0
    score_seconds: float = 0.0
    read_bytes: int = 0

    def add(self, known: Mapping[str, Any]) -> None:
        """Add one record of the ledger."""
        self.evaluations += 1
        self.failed += known.get("failed") is not None
        self.build_seconds += known.get("build_seconds", 0.0)
        self.score_seconds += known.get("score_seconds", 0.0)
        self.read_bytes += known.get("read_bytes", 0)


@dataclass(frozen=True)
class Outcome:
    """Scores of a recipe, or why it has none."""

    scored: Scored | None
    failed: str | None = None


@dataclass(frozen=True)
class Asked:
    """A model to be scored: by what split, on how many items (None: all), for the how-manieth time."""

    recipe: Recipe
    split: str = "search"
    items: int | None = None
    again: int = 0
    name: str = field(default="", compare=False)


class Evaluations:
    """Scores recipes, a few at a time: those that differ in numbers only are built in one pass over the models."""

    def __init__(
        self,
        scorer: Scorer,
        ledger: Ledger,
        workshop: Workshop,
        messages: Path,
        together: int,
        step: Callable[[], None] = lambda: None,
    ) -> None:
        self.scorer, self.workshop, self.messages, self.together = scorer, workshop, messages, together
        self.cost, self.step = Cost(), step
        self._ledger = ledger
        self._counted: set[str] = set()

    def key(self, asked: Asked) -> str:
        """Under which scores are kept: all that they depend on."""
        inputs = self.workshop.inputs(asked.recipe).fingerprints()
        told = asked.recipe.model_dump(mode="json", exclude_defaults=True)
        return fingerprint(
            "search",
            engine(),
            told,
            inputs,
            self.scorer.identity,
            list(self.scorer.names),
            asked.split,
            asked.items,
            asked.again,
            self.workshop.settings.device,
        )

    def scored(self, asked: Sequence[Asked | WeightsmithError]) -> list[Outcome]:
        """The scores of models, in order; equal ones are scored once.  An error stands for a recipe there is not."""
        keys: list[str | WeightsmithError] = []
        todo: dict[str, Asked] = {}
        for one in asked:
            if isinstance(one, WeightsmithError):
                keys.append(one)
                self.step()
                continue
            try:
                key = self.key(one)
            except WeightsmithError as error:
                keys.append(error)
                self.step()
                continue
            if key in self._ledger.known or key in todo:
                self.cost.repeated += key in todo or key in self._counted
                self.step()
            else:
                todo[key] = one
            keys.append(key)
        left = list(todo.items())
        while left:
            some = [one.recipe for _, one in left[: self.together]]
            count = self.workshop.fitting(some, in_memory=self.scorer.in_memory)
            self._some(dict(left[:count]))
            left = left[count:]
        return [self._outcome(key) for key in keys]

    def _some(self, todo: Mapping[str, Asked]) -> None:
        recipes = {key_of(one.recipe): one.recipe for one in todo.values()}
        began = time.perf_counter()
        batch = self.workshop.make(recipes, in_memory=self.scorer.in_memory)
        seconds = (time.perf_counter() - began) / len(todo)
        try:
            for key, one in todo.items():
                found = self._one(one, batch)
                self._ledger.put(
                    key, {**found, "build_seconds": round(seconds, 4), "read_bytes": batch.read_bytes // len(todo)}
                )
                self.step()
        finally:
            names = list(batch.made)
            batch.made.clear()
            for name in names:
                self.workshop.release(name, keep=self.scorer.apart)

    def _one(self, asked: Asked, batch: Any) -> dict[str, Any]:
        name = key_of(asked.recipe)
        if (error := batch.failed.get(name)) is not None:
            return {"failed": str(error)}
        began = time.perf_counter()
        messages = self.messages / f"{name}-{asked.split}.txt"
        try:
            found: dict[str, Any] = self.scorer(batch.made[name], asked.split, asked.items, messages).plain()
        except WeightsmithError as error:
            found = {"failed": str(error)}
        return {**found, "score_seconds": round(time.perf_counter() - began, 4)}

    def _outcome(self, key: str | WeightsmithError) -> Outcome:
        if isinstance(key, WeightsmithError):
            return Outcome(None, str(key))
        known = self._ledger.known[key]
        if key not in self._counted:
            self._counted.add(key)
            self.cost.add(known)
        if known.get("failed") is not None:
            return Outcome(None, str(known["failed"]))
        return Outcome(Scored(known["values"], known["items"], known["errors"]))
