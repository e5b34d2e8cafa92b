"""Low-rank optimizers: a byte-level Llama trained from scratch, moments of its layers' matrices in 16 directions.

Directions are leading singular vectors (GaLore's, found anew every 10 steps), the best columns of the cosine basis at
every step, or columns drawn at random; embeddings, head and vectors get AdamW in all rows.  The figure is the loss per
byte on test texts of all kinds, at the better of two rates; below, what share of the gradient's energy directions keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from study.train.cells import Figures, Room, searched, table
from study.train.languages import KINDS, Texts, batches, llama, loss_of, read, rows_of, train
from study.train.subspace import RANK, SubspaceAdamW, Vectors, leading
from weightsmith.train.optim import DCTAdamW, Projector
from weightsmith.train.optim.bases import basis
from weightsmith.train.optim.projector import tall

__all__ = ["study"]

STEPS, RATES, SEEDS = 200, (1e-3, 2e-3, 5e-3), (0,)


def drawn(g: Tensor, choice: int) -> Tensor:
    """Columns of the cosine basis, others at every choice."""
    draw = torch.Generator().manual_seed(1000 * g.shape[1] + choice)
    return basis("dct3", g.shape[1], g.dtype, g.device)[:, torch.randperm(g.shape[1], generator=draw)[:RANK]]


def drawn_once(g: Tensor, choice: int) -> Tensor:
    return drawn(g, 0)


def groups(model: nn.Module, **of_matrices: Any) -> list[dict[str, Any]]:
    """The layers' matrices with options of their own, and the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    return [{"params": matrices, **of_matrices}, {"params": rest}]


def subspace(model: nn.Module, lr: float, vectors: Vectors, interval: int) -> torch.optim.Optimizer:
    return SubspaceAdamW(groups(model, vectors=vectors), lr, interval)


def dct(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    return DCTAdamW(groups(model, rank=RANK, norm=2, **options), lr, rank=None)


MAKERS: Mapping[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "AdamW, all directions": lambda m, lr: SubspaceAdamW(m.parameters(), lr, 1),
    "SVD, every 10 steps": lambda m, lr: subspace(m, lr, leading, 10),
    "DCT-AdamW": dct,
    "DCT-AdamW, rotated": lambda m, lr: dct(m, lr, rotate=True),
    "DCT-AdamW, rotated, every 10 steps": lambda m, lr: dct(m, lr, rotate=True, interval=10),
    "random columns, every 10 steps": lambda m, lr: subspace(m, lr, drawn, 10),
    "random columns, once": lambda m, lr: subspace(m, lr, drawn_once, 10),
}


def trained(room: Room, texts: Texts, make: Callable[[nn.Module, float], Any], rate: float, seed: int) -> Figures:
    """Test losses."""
    every = [text for kind in KINDS for text in texts[kind]["train"][:124]]
    model = llama(seed)
    train(model, make(model, rate), batches(every, seed), room.steps(STEPS))
    with torch.no_grad():
        found = {kind: float(loss_of(model, rows_of(texts[kind]["test"]))) for kind in KINDS}
    return {**found, "mean": mean(found.values()), "rate": rate}


def energies(room: Room, texts: Texts) -> Figures:
    """Share of the gradients' energy that directions keep, mean over matrices and steps of a run with AdamW."""
    every = [text for kind in KINDS for text in texts[kind]["train"][:124]]
    ways: Mapping[str, Callable[[Tensor], Tensor]] = {
        "SVD": lambda g: g @ leading(g, 0),
        "best columns of the cosine basis": lambda g: Projector(RANK, norm=2).choose(g)[0],
        "best columns of a random basis": lambda g: Projector(RANK, "random", 2).choose(g)[0],
        "random columns": lambda g: g @ drawn(g, 0),
    }
    shares: dict[str, list[float]] = {name: [] for name in ways}

    def watched(model: nn.Module, rows: Tensor) -> Tensor:
        for p in (p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name):
            if p.grad is not None and next(count) % 97 == 0:
                for name, way in ways.items():
                    shares[name].append(float(way(tall(p.grad)).square().sum() / p.grad.square().sum()))
        return loss_of(model, rows)

    count = itertools.count()
    model = llama(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    zero = optimizer.zero_grad
    optimizer.zero_grad = lambda: None  # type: ignore[method-assign,assignment]

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        value = watched(model, rows)
        zero()
        return value

    train(model, optimizer, batches(every, 0), max(room.steps(150), 8), loss)
    return {name: 100 * mean(found) for name, found in shares.items()}


def study(room: Room) -> str:
    """Both tables."""
    texts = read(room.data)
    rows = {
        label: searched(
            room,
            f"optimizers/{label}",
            RATES,
            lambda rate, seed, make=make: trained(room, texts, make, rate, seed),
            SEEDS,
            "mean",
        )
        for label, make in MAKERS.items()
    }
    kept = room.figures("optimizers/energies", lambda: energies(room, texts))
    shares = {name: [{"share": share}] for name, share in kept.items() if name != "seconds"}
    losses = table("loss per byte, nats", rows, (*KINDS, "mean", "rate", "seconds"))
    return f"{losses}\n\n{table('energy of the gradient that 16 directions keep, %', shares, ['share'], '{:.1f}')}"
