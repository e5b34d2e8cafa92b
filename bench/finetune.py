"""python -m bench.finetune --data FOLDER [--seeds 3] : low-rank optimizers and SVFit on real images.

FOLDER has sign_digits.npz (arrays x_train, y_train, x_test, y_test; 32 x 32 RGB photographs of ten signs).  A network
of three layers is trained on them; each optimizer gets the same start, order and learning rate.  Then a network that
knows five of the signs learns the other five, by singular values or by LoRA with as many trained numbers.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from study.train.subspace import RANK, SubspaceAdamW, Vectors, leading
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.table import markdown
from weightsmith.train import svfit
from weightsmith.train.optim import DCTAdamW, Projector
from weightsmith.train.optim.bases import basis
from weightsmith.train.optim.projector import tall

__all__ = ["main"]

WIDTH = 256


def subspace(net: nn.Module, lr: float, vectors: Vectors, interval: int = 1) -> SubspaceAdamW:
    """Moments of matrices along some directions; vectors and small matrices get AdamW in full."""
    large = [p.ndim == 2 and min(p.shape) > RANK for p in net.parameters()]
    matrices, rest = ([p for p, one in zip(net.parameters(), large, strict=True) if one == of] for of in (True, False))
    return SubspaceAdamW([{"params": matrices, "vectors": vectors}, {"params": rest}], lr, interval)


def drawn(g: Tensor, choice: int) -> Tensor:
    """Columns of the cosine basis drawn once."""
    columns = torch.randperm(g.shape[1], generator=torch.Generator().manual_seed(g.shape[1]))[:RANK]
    return basis("dct3", g.shape[1], g.dtype, g.device)[:, columns]


def network(seed: int, classes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(1024, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes)
    )


def run(
    net: nn.Module, optimizer: torch.optim.Optimizer, data: Mapping[str, Tensor], seed: int, epochs: int = 12
) -> tuple[float, float]:
    """Train; the accuracy on the test images, and the training loss of the last epoch."""
    draw, losses = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(data["x_train"]), generator=draw).split(64):
            loss = cross_entropy(net(data["x_train"][rows]), data["y_train"][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    with torch.no_grad():
        right = (net(data["x_test"]).argmax(1) == data["y_test"]).float().mean().item()
    return right, mean(losses)


def optimizers(data: Mapping[str, Tensor], seeds: int) -> list[list[str]]:
    def dct(net: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
        return DCTAdamW(_groups(net), lr, rank=RANK, norm=2, **options)

    makers: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
        "AdamW": lambda net, lr: torch.optim.AdamW(net.parameters(), lr, weight_decay=0),
        "SVD, every 50 steps": lambda net, lr: subspace(net, lr, leading, 50),
        "DCT-AdamW": dct,
        "  rotated": lambda net, lr: dct(net, lr, rotate=True),
        "  rotated, every 10 steps": lambda net, lr: dct(net, lr, rotate=True, interval=10),
        "  rotated, error feedback": lambda net, lr: dct(net, lr, rotate=True, error_feedback=True),
        "best of a random basis, rotated": lambda net, lr: dct(net, lr, rotate=True, basis="random"),
        "drawn columns": lambda net, lr: subspace(net, lr, drawn),
    }
    rows = [[f"rank {RANK}, best of 2 rates", "test accuracy", "last training loss"]]
    for name, make in makers.items():
        found = []
        for lr in (1e-3, 3e-3):
            runs = []
            for seed in range(seeds):
                net = network(seed, 10)
                runs.append(run(net, make(net, lr), data, seed))
            found.append([mean(values) for values in zip(*runs, strict=True)])
        best = max(found)
        rows.append([name, f"{100 * best[0]:.1f}%", f"{best[1]:.3f}"])
    return rows


def _groups(net: nn.Module) -> list[dict[str, Any]]:
    params = list(net.parameters())
    small = [p for p in params if p.ndim == 2 and min(p.shape) <= RANK]
    return [{"params": [p for p in params if all(p is not q for q in small)]}, {"params": small, "rank": None}]


def energies(data: Mapping[str, Tensor]) -> list[list[str]]:
    """Share of the gradient's energy in the chosen directions, mean over the steps of one AdamW run."""
    net = network(0, 10)
    optimizer, draw = torch.optim.AdamW(net.parameters(), 1e-3), torch.Generator().manual_seed(0)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "SVD": lambda g: g @ leading(g, 0),
        "DCT": lambda g: Projector(RANK, norm=2).choose(g)[0],
        "best of a random basis": lambda g: Projector(RANK, "random", 2).choose(g)[0],
        "drawn columns": lambda g: g @ drawn(g, 0),
    }
    shares: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(2):
        for rows in torch.randperm(len(data["x_train"]), generator=draw).split(64):
            optimizer.zero_grad()
            cross_entropy(net(data["x_train"][rows]), data["y_train"][rows]).backward()
            for layer in (net[0], net[2]):
                g = tall(layer.weight.grad)
                for name, way in ways.items():
                    shares[name].append(float(way(g).square().sum() / g.square().sum()))
            optimizer.step()
    return [["energy of the gradient kept", "share"], *([n, f"{100 * mean(s):.1f}%"] for n, s in shares.items())]


def halves(data: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Signs 0 to 4, and 5 to 9 renumbered from 0."""
    found = []
    for low in (0, 5):
        own = {}
        for part in ("train", "test"):
            keep = data[f"y_{part}"] // 5 == low // 5
            own |= {f"x_{part}": data[f"x_{part}"][keep], f"y_{part}": data[f"y_{part}"][keep] - low}
        found.append(own)
    return found


WAYS = ("head only", "SVFit, all values of layers 1 and 2", "LoRA, rank 1 of layer 2")


def adapted(start: nn.Sequential, way: str, lr: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, int]:
    """A copy of a network with a new head and what a way trains, its optimizer, and the numbers beside the head."""
    net = network(seed, 5)
    net.load_state_dict(start.state_dict())
    net[4].reset_parameters()
    net.requires_grad_(False)
    if way.startswith("SVFit"):
        svfit.wrap(net, target_modules=["0", "2"])
    elif way.startswith("LoRA"):
        net[2] = Lora(net[2])
    own = [p for p in net.parameters() if p.requires_grad]
    head = list(net[4].requires_grad_(True).parameters())
    groups = [{"params": head, "lr": 1e-3}, *([{"params": own, "lr": lr}] if own else [])]
    return net, torch.optim.AdamW(groups, weight_decay=0), sum(p.numel() for p in own)


def adapters(data: Mapping[str, Tensor], seeds: int) -> list[list[str]]:
    """The accuracy on signs 5 to 9 of networks that know 0 to 4; the head trains in all, at the same rate."""
    known, new = halves(data)
    found: dict[str, dict[float, list[float]]] = {way: {} for way in WAYS}
    counts = {}
    for seed in range(seeds):
        start = network(seed, 5)
        run(start, torch.optim.AdamW(start.parameters(), 1e-3), known, seed)
        for way, lr in itertools.product(WAYS, (1e-3, 3e-3, 1e-2, 3e-2)):
            net, optimizer, counts[way] = adapted(start, way, lr, seed)
            found[way].setdefault(lr, []).append(run(net, optimizer, new, seed)[0])
    scores = {way: max(map(mean, found[way].values())) for way in WAYS}
    head = ["fine-tuned", "numbers beside the head", "test accuracy, best of 4 rates"]
    return [head, *([way, str(counts[way]), f"{100 * scores[way]:.1f}%"] for way in WAYS)]


class Lora(nn.Module):
    """W x + B A x of rank 1."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(torch.randn(1, layer.in_features) / math.sqrt(layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + (x @ self.a.T) @ self.b.T
        return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.finetune", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with sign_digits.npz")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)
    with np.load(options.data / "sign_digits.npz", allow_pickle=False) as file:
        data = {n: torch.from_numpy(file[n]) for n in ("x_train", "y_train", "x_test", "y_test")}
    data = {n: t.float().mean(3).flatten(1) / 255 - 0.5 if n[0] == "x" else t.long() for n, t in data.items()}
    for rows in (energies(data), optimizers(data, options.seeds), adapters(data, options.seeds)):
        print(markdown(rows), flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
