"""The examples of several tasks, from files: texts with answers, images with labels, images with maps."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.core.errors import RecipeError, SourceError, did_you_mean
from weightsmith.io.read.files import File
from weightsmith.io.read.small import parse_json
from weightsmith.train.multitask.instruct import Instruction, without_shown
from weightsmith.train.multitask.likelihood import checked_candidates
from weightsmith.train.multitask.metrics import OF_KIND
from weightsmith.train.multitask.recipe import MultiTaskRecipe, TaskSpec

__all__ = ["Answer", "Pair", "Task", "Tasks", "checked_pixels", "read_task", "read_tasks"]

Answer = str | int | Tensor

_INPUTS = ("input", "text", "question", "prompt")
_ANSWERS = ("label", "output", "answer", "completion", "response")


@dataclass(frozen=True, eq=False)
class Pair:
    """input: a text or an image [C, H, W] float32; answer: a class, a text, or a map [channels, H, W] float32.

    Pixels of a map that have no label are NaN.
    """

    input: str | Tensor
    answer: Answer


@dataclass(frozen=True, eq=False)
class Task:
    """A task with its examples.

    kind     of answers: label, text or map
    classes  of labels; channels of maps; 0 for texts
    parts    train, valid, test
    notes    what was done to the data, in words
    """

    name: str
    spec: TaskSpec
    kind: str
    classes: int
    parts: Mapping[str, Sequence[Pair]]
    notes: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        return self.spec.metric or OF_KIND[self.kind][0]

    @property
    def instruction(self) -> Instruction | None:
        return None if self.spec.instruction is None else Instruction.of(self.spec.instruction.model_dump())

    def text(self, answer: Answer) -> str:
        """An answer in words: the candidate that a label numbers."""
        return (
            str(answer)
            if self.spec.candidates is None or isinstance(answer, str)
            else self.spec.candidates[int(answer)]
        )

    def counts(self, target: Tensor) -> Tensor:
        """Which pixels of a map have a label."""
        return ~target.isnan()


Tasks = Mapping[str, Task]


def read_tasks(recipe: MultiTaskRecipe, parts: Sequence[str] = ("train", "valid", "test")) -> Tasks:
    """All tasks; RecipeError or SourceError with everything that is wrong with any of them."""
    found: dict[str, Task] = {}
    wrong: list[str] = []
    for name, spec in recipe.tasks.items():
        try:
            found[name] = read_task(name, spec, recipe, parts)
        except (RecipeError, SourceError) as error:
            wrong.append(str(error))
    if wrong:
        raise RecipeError(*wrong)
    return found


def read_task(name: str, spec: TaskSpec, recipe: MultiTaskRecipe, parts: Sequence[str]) -> Task:
    """One task.  Without files of their own, validation is a seeded share of the data, and the test is validation."""
    names = None if spec.candidates is None else checked_candidates(name, spec.candidates)
    pairs = _read(name, Path(spec.data), names, spec)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    held = 0 if spec.valid else min(len(pairs) - 1, max(1, int(recipe.valid * len(pairs)))) if recipe.valid else 0
    valid = [pairs[i] for i in sorted(order[:held])]
    train = [pairs[i] for i in sorted(order[held:])][: recipe.cap]
    if spec.valid:
        valid = _read(name, Path(spec.valid), names, spec)
    test = _read(name, Path(spec.test), names, spec) if spec.test else valid
    found = {"train": train, "valid": valid, "test": test}
    kind = _kind(name, [pair for part in found.values() for pair in part])
    notes = []
    if kind != "map" and spec.instruction is not None:
        given = Instruction.of(spec.instruction.model_dump())
        for part, own in found.items():
            kept = without_shown(given, [str(pair.input) for pair in own])
            if len(kept) < len(own):
                notes.append(f"{name}: {len(own) - len(kept)} {part} examples left out: its instruction shows them")
            found[part] = [own[i] for i in kept]
    if "train" in parts and not found["train"]:
        raise RecipeError(f"task {name!r} has no examples in {spec.data}; leave it out")
    for part, own in found.items():
        if kind == "map" and own and all(isinstance(p.answer, Tensor) and p.answer.isnan().all() for p in own):
            raise RecipeError(f"task {name!r}: no pixel of its {part} maps has a label; is invalid: right?")
    metric = spec.metric or OF_KIND[kind][0]
    allowed = (
        *OF_KIND[kind],
        *(("accuracy",) if kind == "text" else ()),
        *(OF_KIND["text"] if kind == "label" and names else ()),
    )
    if metric not in allowed:
        raise RecipeError(f"task {name!r}: metric {metric!r} does not fit its {kind}s{did_you_mean(metric, allowed)}")
    return Task(
        name, spec, kind, _classes(name, kind, found, names), {part: found[part] for part in parts}, tuple(notes)
    )


def _kind(name: str, pairs: Sequence[Pair]) -> str:
    kinds = {type(pair.answer) for pair in pairs}
    if len(kinds) > 1:
        raise RecipeError(f"task {name!r}: some answers are texts and some are numbers")
    if not kinds:
        raise RecipeError(f"task {name!r} has no examples; leave it out")
    return {int: "label", str: "text"}.get(kinds.pop(), "map")


def _classes(name: str, kind: str, parts: Mapping[str, Sequence[Pair]], names: tuple[str, ...] | None) -> int:
    answers = [pair.answer for part in parts.values() for pair in part]
    if kind == "label":
        labels = [answer for answer in answers if isinstance(answer, int)]
        if names is not None:
            for label in labels:
                if not 0 <= label < len(names):
                    raise RecipeError(f"task {name!r}: label {label} numbers none of its {len(names)} candidates")
            return len(names)
        if min(labels) < 0:
            raise RecipeError(f"task {name!r}: label {min(labels)} is below 0; leave such examples out")
        return max(labels) + 1
    return next((len(answer) for answer in answers if isinstance(answer, Tensor)), 0)


# --- files ------------------------------------------------------------------------------------------


def _read(name: str, path: Path, candidates: tuple[str, ...] | None, spec: TaskSpec) -> list[Pair]:
    file = File(path.expanduser())
    raw = file.read(0, file.size).tobytes()
    if path.suffix == ".npz":
        return _arrays(path, raw, spec)
    if path.suffix != ".jsonl":
        raise SourceError(f"{path}: unknown kind of data of task {name!r}; use .jsonl or .npz")
    found = []
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not readable as UTF-8 text ({error})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found.append(
                _line(parse_json(line.encode(), f"{path}, line {number}"), f"{path}, line {number}", candidates)
            )
    return found


def _line(row: Any, place: str, candidates: tuple[str, ...] | None) -> Pair:
    if not isinstance(row, dict):
        raise SourceError(f"{place}: {type(row).__name__} instead of an object")
    given = next((row[key] for key in _INPUTS if isinstance(row.get(key), str)), None)
    answer = next((row[key] for key in _ANSWERS if isinstance(row.get(key), (str, int))), None)
    if given is None or answer is None or isinstance(answer, bool):
        raise SourceError(f"{place}: needs an input ({', '.join(_INPUTS)}) and an answer ({', '.join(_ANSWERS)})")
    if isinstance(answer, str) and candidates is not None:
        if answer.strip() not in candidates:
            raise SourceError(
                f"{place}: the answer {answer!r} is none of the candidates{did_you_mean(answer, candidates)}"
            )
        answer = candidates.index(answer.strip())
    return Pair(given, answer)


def _arrays(path: Path, raw: bytes, spec: TaskSpec) -> list[Pair]:
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            held = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path}: not a readable .npz file ({error})") from None
    images = next((held[key] for key in ("x", "x_train", "images") if key in held), None)
    maps, labels = held.get("target"), next((held[key] for key in ("y", "y_train", "labels") if key in held), None)
    answers = labels if maps is None else maps
    if images is None or answers is None:
        raise SourceError(f"{path}: needs x with y (labels) or target (maps); it has {', '.join(held)}")
    if len(images) != len(answers):
        raise SourceError(f"{path}: {len(images)} images but {len(answers)} answers")
    inputs = [_planes(image, 3) for image in images]
    if any(x.ndim != 3 or len(x) != 3 for x in inputs):
        raise SourceError(f"{path}: images of shape {images.shape[1:]}; they have 1, 3 or 4 channels")
    if maps is None:
        whole = answers.ndim == 1 and (answers.dtype.kind in "iu" or _are_whole(answers))
        if not whole:
            raise SourceError(f"{path}: y should be a whole number for each image; is {answers.dtype} {answers.shape}")
        return [Pair(x, int(y)) for x, y in zip(inputs, answers, strict=True)]
    return [Pair(x, _map(y, spec, f"{path}: map {i}")) for i, (x, y) in enumerate(zip(inputs, answers, strict=True))]


def _are_whole(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" and bool((np.isfinite(values) & (values == np.round(values))).all())


def _map(stored: np.ndarray, spec: TaskSpec, place: str) -> Tensor:
    """A map with NaN where it has no label; `invalid` and `legal` are values as they are stored."""
    if spec.invalid is None:
        labelled = np.ones(stored.shape, dtype=bool)
    else:
        labelled = ~np.isnan(stored) if spec.invalid == "nan" else stored != spec.invalid
    values = stored[labelled]
    if not np.isfinite(values).all():
        raise SourceError(f"{place} has values that are not finite; name the value of pixels without a label: invalid")
    if spec.legal is not None and values.size and not spec.legal[0] <= values.min() <= values.max() <= spec.legal[1]:
        raise SourceError(
            f"{place} has labels from {values.min():g} to {values.max():g}, outside of legal: "
            f"{spec.legal[0]:g} .. {spec.legal[1]:g}"
        )
    return _planes(stored, None).masked_fill(~_planes(labelled, None).bool(), math.nan)


def _planes(image: np.ndarray, channels: int | None) -> Tensor:
    """[H, W], [H, W, C] or [C, H, W], of bytes or numbers -> [C, H, W] float32; bytes become 0 to 1, alpha goes."""
    x = torch.from_numpy(np.ascontiguousarray(image)).float()
    if image.dtype == np.uint8:
        x = x / 255
    if x.ndim == 2:
        return x[None] if channels is None else x.expand(channels, *x.shape).contiguous()
    if x.shape[-1] in (1, 3, 4) and x.shape[0] not in (1, 3):
        x = x.permute(2, 0, 1).contiguous()
    if channels == 3:
        x = x[:3] if len(x) == 4 else x.expand(3, -1, -1).contiguous() if len(x) == 1 else x
    return x


def checked_pixels(tasks: Tasks, multiple: int, why: str) -> None:
    """RecipeError for images whose sides are no multiple."""
    for task in tasks.values():
        for pair in (pair for part in task.parts.values() for pair in part):
            if isinstance(pair.input, Tensor) and any(side % multiple for side in pair.input.shape[-2:]):
                height, width = pair.input.shape[-2:]
                raise RecipeError(
                    f"task {task.name!r}: an image of {height} x {width} pixels is not divisible by {why} {multiple}; "
                    "resize or crop the images"
                )
