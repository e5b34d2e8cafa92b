"""Digit recognition under unlike input domains: scikit-learn's 1,797 digits, each task seen through another lens.

The base learns a little of everything; each expert goes on with one task.  Merging works because the experts
move only 2 to 3% of the base's norm and share a frozen head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo.family import Family, fingerprint

CLEAN = "clean"
LENSES: Mapping[str, Callable[[Tensor], Tensor]] = {  # images: [n, 8, 8], from 0, paper, to 1, ink
    CLEAN: lambda images: images,
    "invert": lambda images: 1 - images,
    "rotate 90": lambda images: torch.rot90(images, 1, (1, 2)),
    "shift 2": lambda images: nn.functional.pad(images, (2, 0))[:, :, :8],
    "flip": lambda images: images.flip(2),
}
INK_MEAN, INK_STD = 0.305, 0.376  # of the pixels of all digits
State = Mapping[str, Tensor]
TASKS = tuple(name for name in LENSES if name != CLEAN)


@dataclass(frozen=True)
class Training:
    """Settings of one seed; equal settings give equal checkpoints."""

    width: int = 1024
    batch: int = 128
    base_steps: int = 30
    base_rate: float = 1e-3
    expert_steps: int = 60
    expert_rate: float = 1e-4
    joint_steps: int = 120


# --- data ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """images: [n, 8, 8] float32 in [0, 1]; labels: [n]."""

    images: Tensor
    labels: Tensor


@cache
def splits(seed: int) -> dict[str, Split]:
    """Train (30%), validation (20%) and test (50%) of the digits, disjoint, shuffled by the seed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = torch.from_numpy(data.images[order]).float() / 16
    labels = torch.from_numpy(data.target[order])
    first, second = int(0.3 * len(order)), int(0.5 * len(order))
    parts = {"train": slice(0, first), "validation": slice(first, second), "test": slice(second, None)}
    return {name: Split(images[part], labels[part]) for name, part in parts.items()}


# --- network and training --------------------------------------------------------------------------


class Network(nn.Module):
    """64 -> width, one residual block, LayerNorm, head to 10 classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.block = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """images: [n, 8, 8] -> logits [n, 10]."""
        hidden: Tensor = self.stem((images.flatten(1) - INK_MEAN) / INK_STD)
        logits: Tensor = self.head(self.norm(hidden + self.block(hidden)))
        return logits


def warm_up_then_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: 10% linear warm-up, then a half cosine down to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def fit(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, rate: float) -> None:
    """Train in place on (images, labels) batches with AdamW, no weight decay."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=0.0, fused=True)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * warm_up_then_cosine(step, steps)
        images, labels = next(batches)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def batches(split: Split, lenses: tuple[str, ...], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches; every image of a batch is seen through one of `lenses`, in turn."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(split.labels), (size,), generator=draw)
        seen = [LENSES[lens](split.images[part]) for lens, part in zip(lenses, chosen.chunk(len(lenses)), strict=True)]
        yield torch.cat(seen), split.labels[chosen]


def train(folder: Path, seed: int, settings: Training, say: Callable[[str], None]) -> None:
    """Write base, experts and the jointly trained model as raw state dicts, `NAME.safetensors`."""
    torch.manual_seed(seed)
    data = splits(seed)["train"]

    def tuned(start: State | None, lenses: tuple[str, ...], steps: int, rate: float, tag: int) -> Network:
        model = Network(settings.width)
        if start is not None:
            model.load_state_dict(start)
            model.head.requires_grad_(False)  # experts share the base's head
        fit(model, batches(data, lenses, settings.batch, 1000 * seed + tag), steps, rate)
        return model

    say("base")
    base = tuned(None, tuple(LENSES), settings.base_steps, settings.base_rate, tag=0).state_dict()
    models = {"base": base}
    for tag, task in enumerate(TASKS, start=1):
        say(f"expert {task}")
        models[task] = tuned(base, (task,), settings.expert_steps, settings.expert_rate, tag).state_dict()
    say("joint training")
    models["joint"] = tuned(base, TASKS, settings.joint_steps, settings.expert_rate, tag=len(models)).state_dict()
    for name, state in models.items():
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")


# --- evaluation ------------------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, lens: str) -> float:
    """Percent of the images, seen through a lens, whose class is found."""
    found = model(LENSES[lens](split.images)).argmax(1)
    return float(100 * (found == split.labels).double().mean())


class Digits(Family):
    """Four image domains, four seeds, accuracy in percent."""

    name = "digits"
    title = "Digits under unlike input domains"
    about = (
        "scikit-learn's 1,797 digits, an MLP of 2.2 M weights stored as a raw state dict. Each task shows the digits "
        "another way: inverted, rotated by 90 degrees, shifted by 2 columns, mirrored."
    )
    score_name = "accuracy, %"
    higher_is_better = True
    tasks = TASKS
    guards = (CLEAN,)
    forgetting_means = "points of accuracy lost against the base on the unchanged (clean) digits"
    seeds = (0, 1, 2, 3)
    suffix = ".safetensors"

    def __init__(self, settings: Training | None = None) -> None:
        self.settings = settings or Training()

    def key(self, seed: int) -> str:
        return fingerprint(asdict(self.settings), seed, torch.__version__, Path(__file__).read_text("utf-8"))

    def train(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        train(folder, seed, self.settings, say)

    def scores(self, model: Path, seed: int, split: str) -> dict[str, float]:
        file = model if model.is_file() else model / "model.safetensors"
        network = Network(self.settings.width)
        network.load_state_dict(load_file(file))
        network.eval()
        data = splits(seed)[split]
        return {lens: accuracy(network, data, lens) for lens in LENSES}
