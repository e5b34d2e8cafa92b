"""DMM: one denoiser of images with a style for each of three teachers, beside static merges of the teachers.

A small U-Net learns the noise of images at 16x16 (CIFAR-10 in grey, photographs of signs, letters of Omniglot); the
teachers go on from it with one kind each.  The student learns all three by their predictions; merges average weights.
Errors are mean squares between predicted noises, in percent of the mean square between the teachers; distances are
Fréchet's between the pixels of images drawn from one noise.  A picture of the images is written beside the figures.
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, group_norm, interpolate, mse_loss, silu

import weightsmith as ws
from study.train.cells import Figures, Room, table
from weightsmith.train import dmm

__all__ = ["Denoiser", "study"]

SIDE, WIDTH, BATCH = 16, 24, 32
KINDS = ("objects", "signs", "letters")
SEEDS = (0,)
MERGES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "average": ("linear", {}),
    "task arithmetic, lambda 1": ("task_arithmetic", {}),
    "task arithmetic, auto": ("task_arithmetic", {"lambda": "auto"}),
    "TIES": ("ties", {}),
    "TSV merge": ("tsvm", {}),
}
Noise = Callable[[Tensor, Tensor], Tensor]
"""Noisy images [n, 1, SIDE, SIDE] and times [n] -> the noise in them."""


class Block(nn.Module):
    """Two convolutions around the time, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(4 * WIDTH, width)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        y = self.first(silu(group_norm(x, 4))) + self.time(silu(embedded))[:, :, None, None]
        return x + self.last(silu(group_norm(y, 4)))


class Denoiser(nn.Module):
    """A U-Net of three sizes; `time_embedding` is where a style is added."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, 4 * WIDTH))
        self.enter = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.down = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.up = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.leave = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(torch.linspace(0, math.log(1000), WIDTH // 2))
        embedded = self.time_embedding(torch.cat([angles.sin(), angles.cos()], 1))
        y, kept = self.enter(x), []
        for i, block in enumerate(self.down):
            y = block(y if i == 0 else avg_pool2d(y, 2), embedded)
            kept.append(y)
        for i, block in enumerate(self.up):
            y = block(y if i == 0 else interpolate(y, scale_factor=2) + kept[-1 - i], embedded)
        return self.leave(silu(group_norm(y, 4)))


# --- images and noise --------------------------------------------------------------------------------


def images(data: Path) -> dict[str, Tensor]:
    """Of each kind [n, 1, SIDE, SIDE] from -1 to 1."""
    with np.load(data / "cifar10_12k.npz") as held:
        objects = torch.from_numpy(held["x_train"][:4000]).float().mean(3)
    with np.load(data / "sign_digits.npz") as held:
        signs = torch.from_numpy(held["x_train"]).float().mean(3)
    with np.load(data / "omniglot8.npz") as held:
        letters = torch.cat([torch.from_numpy(held[key]).float() for key in held.files if key.endswith("/x")])
    found = {"objects": objects, "signs": signs, "letters": letters}
    return {
        kind: interpolate(x[:, None], (SIDE, SIDE), mode="bilinear", antialias=True) / 127.5 - 1
        for kind, x in found.items()
    }


def signal(t: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the image and of the noise there is at a time from 0 to 1: [n, 1, 1, 1] each."""
    angle = (0.98 * t + 0.01)[:, None, None, None] * math.pi / 2
    return angle.cos(), angle.sin()


def noised(pool: Tensor, draw: torch.Generator, count: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, times and the noise."""
    x = pool[torch.randint(len(pool), (count,), generator=draw)]
    t, noise = torch.rand(count, generator=draw), torch.randn(x.shape, generator=draw)
    alpha, sigma = signal(t)
    return alpha * x + sigma * noise, t, noise


@torch.no_grad()
def drawn(noise: Noise, count: int, steps: int = 25) -> Tensor:
    """Images by DDIM from one noise for all: [count, 1, SIDE, SIDE]."""
    x = torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    times = torch.linspace(1, 0, steps + 1)
    for now, then in itertools.pairwise(times):
        (alpha, sigma), (next_alpha, next_sigma) = signal(now[None]), signal(then[None])
        found = noise(x, now.expand(count))
        clean = ((x - sigma * found) / alpha).clamp(-1, 1)
        x = next_alpha * clean + next_sigma * (x - alpha * clean) / sigma
    return x


def distance(one: Tensor, other: Tensor) -> float:
    """Fréchet's between two sets of images, seen at 8x8 as normal distributions."""
    a, b = (avg_pool2d(x, 2).flatten(1).double() for x in (one, other))
    left, right = torch.cov(a.T), torch.cov(b.T)
    values = torch.linalg.eigvals(left @ right).real.clamp_min(0)
    return float((a.mean(0) - b.mean(0)).square().sum() + left.trace() + right.trace() - 2 * values.sqrt().sum())


# --- training ------------------------------------------------------------------------------------------


def taught(start: Denoiser, pool: Tensor, steps: int, rate: float, seed: int) -> Denoiser:
    """In place, on the noise of images."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(start.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, rate / 10)
    for _ in range(steps):
        x, t, noise = noised(pool, draw)
        optimizer.zero_grad()
        mse_loss(start(x, t), noise).backward()
        optimizer.step()
        schedule.step()
    return start


def distilled(
    base: Denoiser, teachers: Sequence[Denoiser], pool: Tensor, steps: int, seed: int, features: float
) -> dmm.Styled:
    """A student of all teachers."""
    torch.manual_seed(seed)
    student = dmm.Styled(base, styles=len(teachers))
    blocks = [f"{side}.{i}" for side in ("down", "up") for i in range(3)]
    distil = dmm.Distillation(student, teachers, blocks=blocks, feature_weight=features)
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 2e-4)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, t, _ = noised(pool, draw)
        optimizer.zero_grad()
        distil.backward(lambda model, x=x, t=t: model(x, t))
        optimizer.step()
        schedule.step()
    return student


def states(room: Room, seed: int) -> Mapping[str, Path]:
    """Files of the base, the teachers and the student."""

    def make(place: Path) -> None:
        torch.manual_seed(seed)
        pools = images(room.data)
        every = torch.cat([pool[torch.randperm(len(pool))[:1500]] for pool in pools.values()])
        base = taught(Denoiser(), every, room.steps(900), 3e-3, seed)
        save_file(base.state_dict(), place / "base.safetensors")
        teachers = []
        for kind, pool in pools.items():
            teachers.append(taught(loaded(place / "base.safetensors"), pool, room.steps(400), 1e-3, seed))
            save_file(teachers[-1].state_dict(), place / f"{kind}.safetensors")
        for name, features in (("student", 0.002), ("student without features", 0.0)):
            start = loaded(place / "base.safetensors")
            student = distilled(start, teachers, every, room.steps(300), seed, features)
            save_file(student.state_dict(), place / f"{name}.safetensors")

    place = room.folder(f"styles/models-{seed}", make)
    return {file.stem: file for file in place.glob("*.safetensors")}


def loaded(file: Path) -> Denoiser:
    made = Denoiser()
    made.load_state_dict(load_file(file))
    return made


def styled(file: Path) -> dmm.Styled:
    made = dmm.Styled(Denoiser(), styles=len(KINDS))
    made.load_state_dict(load_file(file))
    return made.eval()


# --- what is measured ----------------------------------------------------------------------------------


def rows(files: Mapping[str, Path]) -> dict[str, Mapping[str, Noise]]:
    """What stands in for each teacher: name -> kind -> a denoiser."""
    teachers = {kind: load_file(files[kind]) for kind in KINDS}
    found: dict[str, Mapping[str, Noise]] = {"base": dict.fromkeys(KINDS, loaded(files["base"]))}
    for label, (method, parameters) in MERGES.items():
        merged = Denoiser()
        merged.load_state_dict(ws.merge(teachers, method, base=load_file(files["base"]), **parameters))
        found[label] = dict.fromkeys(KINDS, merged)
    for name in ("student without features", "student"):
        one = styled(files[name])
        found[f"DMM, {name}" if name != "student" else "DMM"] = {
            kind: lambda x, t, i=i, one=one: one.use(i)(x, t) for i, kind in enumerate(KINDS)
        }
    return found


@torch.no_grad()
def errors(files: Mapping[str, Path], pools: Mapping[str, Tensor], made: Mapping[str, Noise]) -> Figures:
    """Against each teacher on images of all kinds, in percent of the distance between teachers."""
    draw = torch.Generator().manual_seed(99)
    x, t, _ = noised(torch.cat([pool[-300:] for pool in pools.values()]), draw, 384)
    wanted = {kind: loaded(files[kind])(x, t) for kind in KINDS}
    between = sum(float(mse_loss(wanted[a], wanted[b])) for a in KINDS for b in KINDS if a != b) / 6
    found = {kind: 100 * float(mse_loss(made[kind](x, t), wanted[kind])) / between for kind in KINDS}
    return {**found, "error": sum(found.values()) / len(found)}


def drawn_distances(theirs: Mapping[str, Tensor], made: Mapping[str, Noise]) -> Figures:
    """Of drawn images from those of the teacher: of the own one, and of the nearest other."""
    once = {made[kind]: drawn(made[kind], len(theirs[kind])) for kind in KINDS}
    ours = {kind: once[made[kind]] for kind in KINDS}
    own = [distance(ours[kind], theirs[kind]) for kind in KINDS]
    others = [min(distance(ours[a], theirs[b]) for b in KINDS if a != b) for a in KINDS]
    return {"own teacher": sum(own) / 3, "nearest other": sum(others) / 3}


def study(room: Room) -> str:
    """The table; the picture of seed 0 lies beside the figures."""
    pools = images(room.data)
    found: dict[str, list[Figures]] = {}
    for seed in SEEDS[: room.steps(len(SEEDS))]:
        files = states(room, seed)
        theirs = {kind: drawn(loaded(files[kind]), 8 if room.short else 96) for kind in KINDS}
        for label, made in rows(files).items():
            measure = lambda made=made, files=files, theirs=theirs: {  # noqa: E731
                **errors(files, pools, made),
                **drawn_distances(theirs, made),
            }
            found.setdefault(label, []).append(room.figures(f"styles/{label}-{seed}", measure))
    files = states(room, 0)
    write_png(room.home / "styles" / "styles.png", picture(files, 2 if room.short else 6))
    columns = (*KINDS, "error", "own teacher", "nearest other")
    return table("error in percent, distance of images", found, columns, "{:.1f}")


def picture(files: Mapping[str, Path], count: int) -> Tensor:
    """A row of images for each: teachers, styles of the student, between two styles, merges: [height, width] bytes."""
    student = styled(files["student"])
    made: list[Noise] = [loaded(files[kind]) for kind in KINDS]
    made += [lambda x, t, i=i: student.use(i)(x, t) for i in range(len(KINDS))]
    between = {0: 0.5, 2: 0.5}
    made.append(lambda x, t, one=student: one.use(between)(x, t))
    every = rows(files)
    made += [every[label][KINDS[0]] for label in ("average", "task arithmetic, lambda 1", "TSV merge")]
    strips = [torch.cat([*drawn(one, count)[:, 0]], 1) for one in made]
    gap = torch.ones(2, strips[0].shape[1])
    whole = torch.cat([part for strip in strips for part in (strip, gap)][:-1])
    return ((whole.clamp(-1, 1) + 1) * 127.5).round().byte().repeat_interleave(3, 0).repeat_interleave(3, 1)


def write_png(file: Path, grey: Tensor) -> None:
    """A grey picture [height, width] of bytes."""
    height, width = grey.shape
    lines = b"".join(b"\0" + bytes(row.tolist()) for row in grey)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    )
