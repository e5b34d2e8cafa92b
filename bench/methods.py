"""python -m bench.methods [--side 768] [--experts 4] [NAME ...] : what each method costs, per parameter and expert.

Processor seconds of one thread for one float32 matrix [side, side] in memory, planning included, without files.  Beside
them, where the method's own publication has a plain way to do it, that way on the same tensors: whole SVDs, or all
weights in one vector.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import weightsmith
from bench.spectral import task_vectors, timed, whole_svds
from bench.table import markdown
from weightsmith.method import BASE, Method, Stage, registered

__all__ = ["main"]


def flattened_ties(deltas: Tensor) -> Tensor:
    """Sort all magnitudes of a model, cut, elect, average: the authors' way, with a density of 0.2."""
    flat = deltas.reshape(len(deltas), -1)
    cut = flat.abs().kthvalue(int(flat.shape[1] * 0.8), dim=1, keepdim=True).values
    kept = flat * (flat.abs() >= cut)
    sign = kept.sum(0).sign()
    agree = torch.where(kept.sign() == sign, kept, 0.0)
    return (agree.sum(0) / (agree != 0).sum(0).clamp(min=1)).reshape(deltas.shape[1:])


def whole_iso(deltas: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    return s.mean() * (u @ v)  # type: ignore[no-any-return]


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda deltas: deltas.mean(0),
    "task_arithmetic": lambda deltas: deltas.sum(0),
    "ties": flattened_ties,
    "tsvm": whole_svds,
    "iso_c": whole_iso,
    "r_tsvm": whole_svds,
}
"""Method -> the same by whole tensors and whole decompositions."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.methods")
    parser.add_argument("names", nargs="*", help="methods; all that need no statistics if none is given")
    parser.add_argument("--side", type=int, default=768)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=2, help="rounds; the quickest counts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    deltas = task_vectors(options.side, options.side, options.experts)
    base = {"layers.0.w.weight": torch.randn(options.side, options.side, generator=torch.Generator().manual_seed(1))}
    experts = {f"e{i}": {n: b + d for n, b in base.items()} for i, d in enumerate(deltas)}
    unit = deltas.numel() / 1e9
    rows = [["method", "CPU s per 10^9 parameters and expert", "plain way : weightsmith"]]
    for name, cls in registered().items():
        if not (name in options.names or (not options.names and measurable(cls, options.experts))):
            continue
        tiny = {n: {k: t[:16, :16].contiguous() for k, t in m.items()} for n, m in experts.items()}
        weightsmith.merge(tiny, name, {k: t[:16, :16].contiguous() for k, t in base.items()})  # kernels are loaded once
        spent = least(lambda n=name: weightsmith.merge(experts, n, base), options.repeat)  # type: ignore[misc]
        plain = PLAIN.get(name)
        ratio = f"{least(lambda p=plain: p(deltas), options.repeat) / spent:.1f}" if plain else "-"  # type: ignore[misc]
        rows.append([name, f"{spent / unit:.1f}", ratio])
        print(" | ".join(rows[-1]), flush=True)
    print("\n" + markdown(rows))
    return 0


def measurable(cls: type[Stage], count: int) -> bool:
    """Methods that merge any number of matrices without statistics."""
    traits = cls.traits
    if cls.traits.name == "keep":
        return False
    fits = traits.min_count <= count <= (traits.max_count or count)
    return issubclass(cls, Method) and set(traits.needs) <= {BASE} and not traits.group and fits


def least(work: Callable[[], object], repeat: int) -> float:
    """Processor seconds of the quickest round."""
    return min(timed(work)[1].cpu for _ in range(repeat))  # type: ignore[arg-type]


if __name__ == "__main__":
    raise SystemExit(main())
