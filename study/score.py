"""Scores for `weightsmith bench`: the file that `--evaluator` names."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from demo.family import Family

if TYPE_CHECKING:
    from study.data import Data


def scores(model: Path, split: str, family: str, seed: int = 0, data: str = "", home: str = "") -> dict[str, float]:
    """Task or guard -> score.

    family  'vision', or one of the demo's
    data    folder of images; '' for scikit-learn's digits under lenses
    home    the demo's folder, where it keeps its texts
    """
    if family == "vision":
        from study.vision import Training, accuracies

        return accuracies(weights(model), images(data), split, Training())
    if family == "questions":
        return answers(model, split, Path(data))
    return demo_family(family, home).scores(model, seed, split)


def answers(model: Path, split: str, folder: Path) -> dict[str, float]:
    """Percent of the questions of every task whose likeliest continuation is the right one."""
    from weightsmith.study.evaluators.specs import Choices
    from weightsmith.study.evaluators.subject import Setting, Subject
    from weightsmith.study.evaluators.text_tasks import choices

    subject = Subject(model.name, model, Setting(device="cpu", batch=64))
    files = {file.name.removesuffix(f".{split}.jsonl"): file for file in sorted(folder.glob(f"*.{split}.jsonl"))}
    return {
        task: 100 * choices(subject, Choices(file=str(file), joint="")).metrics["acc"] for task, file in files.items()
    }


def weights(model: Path) -> Path:
    """The file of a checkpoint, or of what a merge wrote."""
    return model if model.is_file() else model / "model.safetensors"


@cache
def images(folder: str) -> Data:
    """The data sets of a folder, read once."""
    from study.data import load

    return load(Path(folder) if folder else None)


@cache
def demo_family(name: str, home: str) -> Family:
    """One of the demo's families."""
    from demo.digits import Digits
    from demo.text import Text

    return Digits() if name == "digits" else Text(Path(home))
