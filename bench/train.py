"""python -m bench.train [--size 2048] [--ranks 64 256] [--repeat 5] : what a step of low-rank AdamW costs, and keeps.

One matrix of noise.  The SVD row is GaLore's projection (arXiv 2403.03507): the same AdamW in the subspace of the
gradient's leading singular vectors, found anew in each of the steps that are timed; GaLore finds them every 200.
Bytes of the state are measured, and must be those of the formula.  "FFTs and products alone" is what no step can do
without: the FFTs of the gradient, on rows in cache and without the permutations around them, and the cheaper of a
product with `rank` columns and of FFTs back.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.table import markdown
from weightsmith.train.optim import DCTAdamW, Projector, Trion, state_bytes
from weightsmith.train.optim.projector import in_cache

__all__ = ["Floor", "SvdAdamW", "in_turn", "main", "seconds"]


class SvdAdamW(torch.optim.Optimizer):
    """GaLore's AdamW for [n, N] with n >= N: moments [n, rank] along the leading right singular vectors [N, rank]."""

    def __init__(self, params: Any, lr: float, rank: int) -> None:
        super().__init__(params, {"lr": lr, "rank": rank})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["vectors"] = torch.linalg.svd(p.grad, full_matrices=False)[2][: group["rank"]].T
                low = p.grad @ state["vectors"]
                m = state.setdefault("m", torch.zeros_like(low)).lerp_(low, 0.1)
                v = state.setdefault("v", torch.zeros_like(low)).mul_(0.999).addcmul_(low, low, value=0.001)
                p.add_(m / v.sqrt().add_(1e-8) @ state["vectors"].T, alpha=-group["lr"])


def seconds(optimizer: torch.optim.Optimizer) -> float:
    """Processor time of a step."""
    began = time.process_time()
    optimizer.step()
    return time.process_time() - began


def in_turn(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer, repeat: int) -> tuple[float, float]:
    """The shortest step, and the median of its ratios to the other's steps, each right before it."""
    optimizer.step()
    pairs = [(seconds(other), seconds(optimizer)) for _ in range(repeat)]
    return min(own for _, own in pairs), median(own / before for before, own in pairs)


class Floor(torch.optim.Optimizer):
    """The least operations of a step of a matrix [n, N]: no order, no norms, no choice, no moments."""

    def __init__(self, params: Any, rank: int) -> None:
        super().__init__(params, {"rank": rank})
        (p,) = self.param_groups[0]["params"]
        self.low, self.columns = torch.randn(len(p), rank), torch.randn(rank, p.shape[1])
        self.spectrum = torch.randn(len(in_cache(p)[0]), p.shape[1] // 2 + 1, dtype=torch.complex64)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        (p,) = self.param_groups[0]["params"]
        back = Projector(self.low.shape[1])._by_fft(p.device, self.low.shape[1], p.shape[1])
        for into, low in zip(in_cache(p), in_cache(self.low, p.shape[1]), strict=True):
            found = torch.fft.irfft(self.spectrum, n=p.shape[1])
            if back:
                torch.fft.rfft(found)
            else:
                into.addmm_(low, self.columns, alpha=-1e-9)


def kept(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state."""
    tensors = [value for own in optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the matrix")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeat", type=int, default=5, help="steps, each after one of fused AdamW")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(options.size, options.size))
    p.grad = torch.randn(options.size, options.size)
    made: list[tuple[str, torch.optim.Optimizer]] = [("AdamW, fused", torch.optim.AdamW([p], fused=True))]
    made.append(("AdamW, a loop", torch.optim.AdamW([p], foreach=False)))
    for rank in options.ranks:
        made += [
            (f"DCT-AdamW, rank {rank}", DCTAdamW([p], rank=rank)),
            ("  by a product", DCTAdamW([p], rank=rank, fft=False)),
            ("  interval 10", DCTAdamW([p], rank=rank, interval=10)),
            ("  error feedback, 8 bits", DCTAdamW([p], rank=rank, error_feedback=8)),
            ("  FFTs and products alone", Floor([p], rank)),
            (f"Trion, rank {rank}", Trion([p], rank=rank)),
            (f"SVD, rank {rank}", SvdAdamW([p], 1e-3, rank)),
        ]
        for options_of in ({}, {"error_feedback": 8}):
            if state_bytes(p.shape, rank, **options_of) != (found := _measured(p, rank=rank, **options_of)):
                raise SystemExit(f"rank {rank}: the state has {found} bytes, the formula says otherwise")
    rows = [["step on one matrix", "ms", "of fused AdamW", "state, MB"]]
    fused = torch.optim.AdamW([p], fused=True)
    fused.step()
    for name, optimizer in made:
        took, ratio = in_turn(optimizer, fused, 2 if name.startswith("SVD") else options.repeat)
        rows.append([name, f"{1000 * took:.1f}", f"{ratio:.1f}", f"{kept(optimizer) / 1e6:.1f}"])
        optimizer.state.clear()
    print(f"{options.size} x {options.size}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(markdown(rows))
    return 0


def _measured(p: torch.nn.Parameter, **options: Any) -> int:
    optimizer = DCTAdamW([torch.nn.Parameter(p.detach().clone())], **options)
    optimizer.param_groups[0]["params"][0].grad = p.grad
    optimizer.step()
    return kept(optimizer)


if __name__ == "__main__":
    sys.exit(main())
