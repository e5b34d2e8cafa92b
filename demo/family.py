"""What the demo needs to know about a family of models, and the cache of what was trained and measured."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOINT = "joint"
BASE = "base"


def fingerprint(*parts: Any) -> str:
    """12 hex digits over anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def write(file: Path, text: str) -> None:
    """Write a text file that appears complete or not at all; the folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(file)


class Family(ABC):
    """A base, one expert per task, a jointly trained model, and a way to score any model of that shape."""

    name: str
    title: str
    about: str
    score_name: str
    higher_is_better: bool
    tasks: tuple[str, ...]
    guards: tuple[str, ...]  # what else is scored, to see what is forgotten
    forgetting_means: str
    seeds: tuple[int, ...]
    suffix: str  # of a checkpoint's file, '' for a folder

    @abstractmethod
    def key(self, seed: int) -> str:
        """Fingerprint of all that decides the checkpoints."""

    @abstractmethod
    def train(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        """Write `base`, one checkpoint per task and `joint` into `folder`."""

    @abstractmethod
    def scores(self, model: Path, seed: int, split: str) -> dict[str, float]:
        """Load a checkpoint, or what a merge wrote, and score it on every task and guard of a split."""

    def file(self, folder: Path, model: str) -> Path:
        """Where a checkpoint lies."""
        return folder / f"{model}{self.suffix}"

    def checkpoints(self, home: Path, seed: int, say: Callable[[str], None]) -> Path:
        """Return the folder of a seed's checkpoints; train them if they are not there yet."""
        folder = home / self.name / f"seed{seed}-{self.key(seed)}"
        if not folder.is_dir():
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.train(partial, seed, say)
            partial.rename(folder)  # a killed run leaves no half-trained folder behind
        return folder


class Scores:
    """Scores by key, kept in one JSON file, so that a second run measures nothing twice."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, dict[str, float]] = json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def get(self, key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return the scores stored under `key`, or measure and store them."""
        if key not in self.known:
            self.known[key] = measure()
            write(self.file, json.dumps(self.known, indent=1))
        return self.known[key]
