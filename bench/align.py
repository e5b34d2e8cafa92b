"""Aligning beside what it costs to do it plainly.

    python -m bench.align mlp [WIDTH]     weight matching of two MLPs with 4 hidden layers, beside a plain torch loop
    python -m bench.align llama A B OUT   whole transformers: time and memory beside reading both and writing one

The loop does what public ports of git-re-basin do: a group after the other it permutes every tensor whole, accumulates
products in float32 and solves one assignment, until a sweep changes nothing.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from weightsmith.align.match import match, objective
from weightsmith.core.symmetry import Axis, SymmetryGroup, permute

INPUTS, CLASSES, HIDDEN = 784, 10, 4


def model(width: int, seed: int) -> dict[str, Tensor]:
    """An MLP with four hidden layers, as torch begins it."""
    torch.manual_seed(seed)
    sizes = [INPUTS, *[width] * HIDDEN, CLASSES]
    found: dict[str, Tensor] = {}
    for i in range(len(sizes) - 1):
        layer = torch.nn.Linear(sizes[i], sizes[i + 1])
        found |= {f"{i}.weight": layer.weight.detach(), f"{i}.bias": layer.bias.detach()}
    return found


def groups(width: int) -> list[SymmetryGroup]:
    axes = [(Axis(f"{i}.weight", 0), Axis(f"{i}.bias", 0), Axis(f"{i + 1}.weight", 1)) for i in range(HIDDEN)]
    return [SymmetryGroup(str(i), "mlp", width, own) for i, own in enumerate(axes)]


def plain(a: dict[str, Tensor], b: dict[str, Tensor], width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The loop."""
    owner = {f"{i}.weight": (i if i < HIDDEN else None, i - 1 if i else None) for i in range(HIDDEN + 1)}
    owner |= {f"{i}.bias": (i if i < HIDDEN else None,) for i in range(HIDDEN + 1)}
    perm = {i: torch.arange(width) for i in range(HIDDEN)}
    draw = np.random.default_rng(seed)
    for _ in range(100):
        progress = False
        for p in draw.permutation(HIDDEN):
            profit = torch.zeros(width, width)
            for name, axes in owner.items():
                for axis, other in enumerate(axes):
                    if other != p:
                        continue
                    moved = b[name]
                    for n, q in enumerate(axes):
                        if q is not None and n != axis:
                            moved = torch.index_select(moved, n, perm[q])
                    left, right = (t.movedim(axis, 0).reshape(width, -1) for t in (a[name], moved))
                    profit += left @ right.T
            _, order = linear_sum_assignment(profit.numpy(), maximize=True)
            eye = torch.eye(width)
            before = torch.einsum("ij,ij->i", profit, eye[perm[int(p)]]).sum()
            after = torch.einsum("ij,ij->i", profit, eye[order]).sum()
            progress |= bool(after > before + 1e-12)
            perm[int(p)] = torch.from_numpy(order)
        if not progress:
            break
    return {str(i): order.numpy() for i, order in perm.items()}


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and CPU seconds."""
    start = time.process_time()
    return run(), time.process_time() - start


def reached(a: dict[str, Tensor], b: dict[str, Tensor], width: int, orders: dict[str, np.ndarray]) -> float:
    for group in groups(width):
        b = {**b, **permute(b, group, orders)}
    names = {name for group in groups(width) for name in group.names}
    return objective({n: a[n].double() for n in names}, {n: b[n] for n in names})


def mlp(width: int) -> None:
    a, b = model(width, 0), model(width, 1)
    draw = np.random.default_rng(5)
    hidden = {str(i): draw.permutation(width) for i in range(HIDDEN)}
    related = dict(a)
    for group in groups(width):
        related |= permute(related, group, hidden)
    related = {n: t + 0.3 * t.std() * torch.randn(t.shape) for n, t in related.items()}
    for title, other in (("unrelated", b), ("a noisy copy in another order", related)):
        for again in range(2):
            ours, here = timed(lambda other=other: match(groups(width), a, other).orders)
            loop, there = timed(lambda other=other: plain(a, other, width))
            scores = [reached(a, other, width, dict(o)) for o in (ours, loop)]
            sys.stdout.write(
                f"{title}, run {again}: {here:.2f} s, loop {there:.2f} s ({there / here:.1f}x); objective "
                f"{scores[0]:.4f} and {scores[1]:.4f}\n"
            )
            sys.stdout.flush()


def llama(first: Path, second: Path, out: Path) -> None:
    import weightsmith.align.match as matching
    from weightsmith.align.run import Settings, align
    from weightsmith.io.read.open import open_source
    from weightsmith.ops.assign import assigned

    def read() -> None:
        for source in map(open_source, (first, second)):
            for name in source.keys:
                source.read(name)

    spent = [0.0]

    def counted(profit: np.ndarray, tol: float = 1e-12) -> np.ndarray:
        order, seconds = timed(lambda: assigned(profit, tol))
        spent[0] += seconds
        return order

    matching.assigned = counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, seconds = timed(lambda: align(second, first, out, Settings(freeze=("residual",)), overwrite=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, reading = timed(read)
    source = open_source(first)
    _, writing = timed(lambda: _copy(source, out.with_name("copy.bin")))
    sys.stdout.write(f"reading both {reading:.2f} s, writing one {writing:.2f} s; aligning {seconds:.2f} CPU s, ")
    sys.stdout.write(f"{spent[0]:.2f} s of them assignments\n")
    sys.stdout.write(f"peak {peak / 1024:.0f} MiB ({before / 1024:.0f} MiB before)\n")
    sys.stdout.write(f"objective {found.before:.6g} -> {found.after:.6g}\n")


def _copy(source: Any, path: Path) -> None:
    with path.open("wb") as file:
        for name in source.keys:
            file.write(source.bits(name).tobytes())
    path.unlink()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "mlp":
        mlp(int(sys.argv[2]) if len(sys.argv) > 2 else 2048)
    else:
        llama(*map(Path, sys.argv[2:5]))
