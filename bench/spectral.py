"""python -m bench.spectral [--layers 1] [--threads 1] : TSV merge against whole SVDs, on the shapes of ViT-B/32.

The straightforward version is what the paper and its code describe: float32 `torch.linalg.svd` of every task vector and
of both stacked factors.  Both work on the same tensors in one process, in turn; what counts are processor seconds.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.table import markdown
from weightsmith.core.keys import Key
from weightsmith.core.method import registry
from weightsmith.core.site import Site

__all__ = ["SHAPES", "main", "task_vectors", "whole_svds"]

SHAPES = {"q, k, v, out": (768, 768, 4), "fc1": (3072, 768, 1), "fc2": (768, 3072, 1), "positions": (50, 768, 0)}
"""Rows, columns, and how many a block has; the positional embedding stands outside the blocks."""

BLOCKS = 12


@dataclass(frozen=True)
class Spent:
    cpu: float
    wall: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.spectral", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, for both")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the quickest of each counts")
    parser.add_argument("--exact", action="store_true", help="the error of both against float64 (slow)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = [
        ["matrices", "in 12 blocks", "whole SVDs, CPU s", "tsvm, CPU s", "ratio", "difference", "errors to float64"]
    ]
    sums = [0.0, 0.0]
    for name, (m, n, each) in SHAPES.items():
        deltas = task_vectors(m, n, options.experts)
        count = each * BLOCKS or 1
        theirs, ours = [], []
        for _ in range(options.repeat):
            want, spent = timed(lambda d=deltas: whole_svds(d))  # type: ignore[misc]
            theirs.append(spent.cpu)
            got, spent = timed(lambda d=deltas: merged(d))  # type: ignore[misc]
            ours.append(spent.cpu)
        errors = "-"
        if options.exact:
            truth = whole_svds(deltas.double())
            errors = f"{distance(want, truth):.0e}, {distance(got, truth):.0e}"
        a, b = min(theirs), min(ours)
        sums = [sums[0] + a * count, sums[1] + b * count]
        cells = [f"{name} {m}x{n}", str(count), f"{a:.2f}", f"{b:.2f}", f"{a / b:.1f}"]
        rows.append([*cells, f"{distance(got, want):.0e}", errors])
        print(" | ".join(rows[-1]), flush=True)
    rows.append(["whole model", "", f"{sums[0]:.0f}", f"{sums[1]:.0f}", f"{sums[0] / sums[1]:.1f}", "", ""])
    print("\n" + markdown(rows))
    return 0


def task_vectors(m: int, n: int, count: int, seed: int = 0) -> Tensor:
    """[count, m, n] float32: singular values falling about as (1 + i / 8)^-0.7, a third of the directions shared."""
    noise = torch.Generator().manual_seed(seed)
    smaller = min(m, n)
    values = (1 + torch.arange(smaller) / 8) ** -0.7
    left, right = (torch.randn(size, smaller, generator=noise) for size in (m, n))
    found = []
    for _ in range(count):
        u, v = (0.3 * side + torch.randn(side.shape, generator=noise) for side in (left, right))
        found.append((u * values) @ v.T * (8e-3 / (m * n) ** 0.5))
    return torch.stack(found)


def whole_svds(deltas: Tensor) -> Tensor:
    """The merged task vector as the published code finds it, in the dtype of the task vectors."""
    rank = min(deltas.shape[1:]) // len(deltas)
    found = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    u = torch.cat([f.U[:, :rank] for f in found], 1)
    v = torch.cat([f.Vh[:rank] for f in found], 0)
    s = torch.cat([f.S[:rank] for f in found])
    pu, _, qu = torch.linalg.svd(u, full_matrices=False)
    pv, _, qv = torch.linalg.svd(v, full_matrices=False)
    return ((pu @ qu) * s) @ (pv @ qv)  # type: ignore[no-any-return]


def merged(deltas: Tensor) -> Tensor:
    """The same by the method itself, around a base of zeros."""
    method = registry("tsvm")()
    names = tuple(f"e{i}" for i in range(len(deltas)))
    key = Key("w", tuple(deltas.shape[1:]), "float32")
    return method.merge(Site(key, deltas, torch.zeros_like(deltas[0]), is_delta=True, names=names))  # type: ignore[attr-defined,no-any-return]


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, Spent]:
    """Its result, processor seconds and wall seconds."""
    before, start = _used(), time.perf_counter()
    found = work()
    return found, Spent(_used() - before, time.perf_counter() - start)


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def _used() -> float:
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime


if __name__ == "__main__":
    raise SystemExit(main())
