"""Image classification tasks from a folder of .npz files, or scikit-learn's digits seen through eight lenses.

A file holds one data set (`x_train`, `y_train`, `x_test`, `y_test`) or several (`NAME/x`, `NAME/y` and, if some
writers are kept for testing, `NAME/drawer`).  Images are [n, height, width] or [n, height, width, 3], 0 to 255.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SIDE = 16
GUARDS = 2  # the smallest data sets of a folder: the base learns them, no expert does
VALIDATION = 600  # images at most
SPLITS = ("train", "validation", "test")

LENSES: Mapping[str, Callable[[Tensor], Tensor]] = {  # images: [n, 8, 8], from 0, paper, to 1, ink
    "clean": lambda images: images,
    "invert": lambda images: 1 - images,
    "rotate-90": lambda images: torch.rot90(images, 1, (1, 2)),
    "rotate-180": lambda images: torch.rot90(images, 2, (1, 2)),
    "mirror": lambda images: images.flip(2),
    "transpose": lambda images: images.transpose(1, 2),
    "shift-right": lambda images: nn.functional.pad(images, (2, 0))[:, :, :8],
    "shift-down": lambda images: nn.functional.pad(images, (0, 0, 2, 0))[:, :8],
    "outline": lambda images: (images - nn.functional.avg_pool2d(images[:, None], 3, 1, 1)[:, 0]).abs(),
}


@dataclass(frozen=True, eq=False)
class Split:
    """images: [n, 3, SIDE, SIDE] float32 from 0 to 1; labels: [n] int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Task:
    """One data set, in three disjoint parts."""

    name: str
    classes: int
    splits: Mapping[str, Split]


@dataclass(frozen=True, eq=False)
class Data:
    """What experts are trained for, and what only the base learns."""

    tasks: tuple[Task, ...]
    guards: tuple[Task, ...]

    @property
    def all(self) -> tuple[Task, ...]:
        return (*self.tasks, *self.guards)


def load(folder: Path | None) -> Data:
    """Read every data set of a folder and add scikit-learn's digits; without a folder, the digits under lenses."""
    if folder is None:
        lensed = [digits(name) for name in LENSES]
        return Data(tuple(lensed[1:]), tuple(lensed[:1]))
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise SystemExit(f"{folder}: no .npz files; each holds x_train, y_train, x_test and y_test, or NAME/x, NAME/y")
    found = [task for file in files for task in read(file)]
    found.sort(key=lambda task: len(task.splits["train"].labels))
    guards = found[:GUARDS] if len(found) > GUARDS + 2 else []
    tasks = [*found[len(guards) :], digits("clean", "digits")]
    return Data(tuple(sorted(tasks, key=lambda task: task.name)), tuple(sorted(guards, key=lambda task: task.name)))


def read(file: Path) -> Iterator[Task]:
    """The data sets of one file."""
    with np.load(file, allow_pickle=False) as stored:
        held = dict(stored)
    if {"x_train", "y_train", "x_test", "y_test"} <= set(held):
        train, rest = shuffled(len(held["y_train"]))
        parts = {"train": train, "validation": rest}
        images = {name: held["x_train"][index] for name, index in parts.items()} | {"test": held["x_test"]}
        labels = {name: held["y_train"][index] for name, index in parts.items()} | {"test": held["y_test"]}
        yield made(file.stem, images, labels)
        return
    names = sorted(name.removesuffix("/x") for name in held if name.endswith("/x"))
    if not names:
        raise SystemExit(f"{file}: holds {', '.join(sorted(held)[:6])}; needed: x_train, y_train, x_test, y_test")
    for name in names:
        x, y = held[f"{name}/x"], held[f"{name}/y"]
        if f"{name}/drawer" in held:  # nobody's hand is both learnt from and tested on
            drawer = held[f"{name}/drawer"]
            index = {"train": drawer <= 12, "validation": (drawer > 12) & (drawer <= 15), "test": drawer > 15}
        else:
            index = dict(zip(SPLITS, cut(len(y)), strict=True))
        yield made(name, {s: x[i] for s, i in index.items()}, {s: y[i] for s, i in index.items()})


def digits(lens: str, name: str = "") -> Task:
    """scikit-learn's 1,797 digits through a lens."""
    from sklearn.datasets import load_digits

    stored = load_digits()
    seen = LENSES[lens](torch.from_numpy(stored.images).float() / 16).clamp(0, 1).numpy() * 255
    index = dict(zip(SPLITS, cut(len(stored.target)), strict=True))
    return made(name or lens, {s: seen[i] for s, i in index.items()}, {s: stored.target[i] for s, i in index.items()})


def cut(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """60% to training, 15% to validation, 25% to test, the same for everybody."""
    order = np.random.default_rng(0).permutation(count)
    first, second = int(0.6 * count), int(0.75 * count)
    return order[:first], order[first:second], order[second:]


def shuffled(count: int) -> tuple[np.ndarray, np.ndarray]:
    """15% of the training images, at most VALIDATION, go to validation."""
    order = np.random.default_rng(0).permutation(count)
    kept = min(VALIDATION, int(0.15 * count))
    return order[kept:], order[:kept]


def made(name: str, images: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> Task:
    """Images of any size, grey or coloured, as one task with classes from 0."""
    known = np.unique(np.concatenate(list(labels.values())))
    if empty := [split for split in SPLITS if len(labels[split]) == 0]:
        raise SystemExit(f"{name}: no image for {empty[0]}; give it more images, or more writers")
    splits = {s: Split(pictures(images[s]), torch.from_numpy(np.searchsorted(known, labels[s]))) for s in SPLITS}
    return Task(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), len(known), splits)


def pictures(raw: np.ndarray) -> Tensor:
    """[n, h, w] or [n, h, w, 3], 0 to 255 -> [n, 3, SIDE, SIDE], 0 to 1."""
    images = torch.from_numpy(np.ascontiguousarray(raw)).float() / 255
    images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    if images.shape[-2:] != (SIDE, SIDE):
        images = nn.functional.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    return images.contiguous()
