"""A residual MLP on images, one base and one expert per task, with frozen heads.

Every expert stops as soon as it has moved `displacement` of the base's norm: from experts that go much further, a
merge gets little.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from study.data import SIDE, Data, Split, Task

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Training:
    """Settings; equal settings and equal data give equal checkpoints."""

    width: int = 384
    blocks: int = 3
    base_steps: int = 60
    base_batch: int = 16  # images per task
    base_rate: float = 1e-3
    expert_steps: int = 200  # at most
    expert_batch: int = 64
    expert_rate: float = 1e-4
    displacement: float = 0.025
    joint_steps: int = 150
    observed: int = 256  # images per statistic


class Block(nn.Module):
    """LayerNorm and an MLP, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, width], returned in the same shape."""
        grown: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return grown


class Network(nn.Module):
    """Pixels -> width, residual blocks, LayerNorm, the head of the task that `self.task` names."""

    def __init__(self, settings: Training, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.task = next(iter(classes))
        self.stem = nn.Linear(3 * SIDE**2, settings.width)
        self.blocks = nn.ModuleList(Block(settings.width) for _ in range(settings.blocks))
        self.norm = nn.LayerNorm(settings.width)
        self.heads = nn.ModuleDict({task: nn.Linear(settings.width, count) for task, count in classes.items()})

    def forward(self, images: Tensor) -> Tensor:
        """images: [n, 3, SIDE, SIDE] -> logits [n, classes of the task]."""
        logits: Tensor = self.heads[self.task](self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """images: [n, 3, SIDE, SIDE] -> what the heads see, [n, width].  Every image is standardised by itself."""
        flat = images.flatten(1)
        hidden = self.stem((flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-3))
        for block in self.blocks:
            hidden = block(hidden)
        seen: Tensor = self.norm(hidden)
        return seen


# --- training --------------------------------------------------------------------------------------


def batches(split: Split, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches, each moved by up to one pixel: [size, 3, SIDE, SIDE], [size]."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(split.labels), (size,), generator=draw)
        x, y = torch.randint(-1, 2, (2,), generator=draw).tolist()
        yield torch.roll(split.images[chosen], (y, x), (2, 3)), split.labels[chosen]


def moved(model: nn.Module, base: State) -> float:
    """|model - base| / |base| over all that merges, the heads left out."""
    pairs = [(p.detach(), base[n]) for n, p in model.named_parameters() if not n.startswith("heads.")]
    change = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return float((change / sum(float(b.double().square().sum()) for _, b in pairs)) ** 0.5)


def fit(
    model: Network,
    tasks: Sequence[Task],
    size: int,
    steps: int,
    rate: float,
    seed: int,
    base: State | None = None,
    limit: float = float("inf"),
) -> int:
    """Train in place, every step on `size` images of each task; returns the steps taken before `limit` was reached."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=0.0, fused=True)
    streams = {task.name: batches(task.splits["train"], size, 1000 * seed + at) for at, task in enumerate(tasks)}
    for step in range(steps):
        late = 1.0 if base is not None else max(0.02, 1 - step / steps)  # an expert may stop at any step
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * late
        optimizer.zero_grad()
        drawn = [next(streams[task.name]) for task in tasks]
        seen = model.features(torch.cat([images for images, _ in drawn])).split(size)
        losses = [
            nn.functional.cross_entropy(model.heads[task.name](part), labels)
            for task, part, (_, labels) in zip(tasks, seen, drawn, strict=True)
        ]
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if base is not None and moved(model, base) >= limit:
            return step + 1
    return steps


def train(folder: Path, data: Data, seed: int, settings: Training, say: Callable[[str], None]) -> None:
    """Write base, experts, joint training, statistics of the experts, and `moved.json` into a folder."""
    from weightsmith.observe.collect import observe

    torch.manual_seed(seed)
    classes = {task.name: task.classes for task in data.all}
    model = Network(settings, classes)
    say(f"base, {settings.base_steps} steps on {len(classes)} data sets")
    fit(model, data.all, settings.base_batch, settings.base_steps, settings.base_rate, seed)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(base, folder / "base.safetensors")
    model.heads.requires_grad_(False)  # experts share the base's heads
    story = {}
    for at, task in enumerate(data.tasks, start=1):
        model.load_state_dict(base)
        steps, rate = settings.expert_steps, settings.expert_rate
        taken = fit(model, (task,), settings.expert_batch, steps, rate, 100 * seed + at, base, settings.displacement)
        story[task.name] = {"steps": taken, "moved": moved(model, base)}
        say(f"expert {task.name}: {taken} steps, moved {100 * story[task.name]['moved']:.2f}% of the base's norm")
        save_file(model.state_dict(), folder / f"{task.name}.safetensors")
        model.task = task.name
        seen = task.splits["train"]
        examples = list(zip(seen.images[: settings.observed], seen.labels[: settings.observed].tolist(), strict=True))
        observe(model, examples, ("gram", "fisher"), folder / "stats" / task.name, kind="image-classification",
                examples=settings.observed, batch=64, fisher="sampled", device="cpu", seed=seed)  # fmt: skip
    model.load_state_dict(base)
    model.requires_grad_(True)
    model.heads.requires_grad_(False)
    fit(model, data.tasks, settings.base_batch, settings.joint_steps, settings.expert_rate, 100 * seed, base)
    story["joint"] = {"steps": settings.joint_steps, "moved": moved(model, base)}
    say(f"joint training: {settings.joint_steps} steps, moved {100 * story['joint']['moved']:.2f}%")
    save_file(model.state_dict(), folder / "joint.safetensors")
    (folder / "moved.json").write_text(json.dumps(story, indent=1), "utf-8")


# --- evaluation ------------------------------------------------------------------------------------


@torch.no_grad()
def accuracies(file: Path, data: Data, split: str, settings: Training) -> dict[str, float]:
    """Percent of each task's images whose class a checkpoint finds."""
    model = Network(settings, {task.name: task.classes for task in data.all})
    model.load_state_dict(load_file(file))
    model.eval()
    found = {}
    for task in data.all:
        model.task = task.name
        part = task.splits[split]
        answers = torch.cat([model(images).argmax(1) for images in part.images.split(256)])
        found[task.name] = float(100 * (answers == part.labels).double().mean())
    return found
