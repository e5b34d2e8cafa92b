"""python -m bench.methods [--side 768] [--experts 4] [NAME ...] : what each method costs, per parameter and expert.

Where the cost does not grow with the side of the matrices, the ratio to the plain way is also taken on matrices whose
intermediate results fit into no cache (`--large`), as those of most models do not.

Processor seconds of one thread for float32 matrices [side, side] in memory, without planning and files.  Beside them
the plain way to do it on the same tensors (`bench.plain`): whole SVDs, whole sorts, sums in torch.
Filters are measured with the plain sum of task vectors behind (or, where they belong behind, in front of) them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.plain import PLAIN
from bench.spectral import task_vectors, timed
from bench.table import markdown
from weightsmith.core import checks
from weightsmith.core.method import BASE, Codec, Filter, GroupMethod, MergedFilter, Stage, StandaloneCodec, registered
from weightsmith.engine.carry import carry_out
from weightsmith.inputs.opened import Inputs
from weightsmith.io.read.source import MemorySource
from weightsmith.io.write.sink import MemorySink
from weightsmith.plan.costs import costs_of
from weightsmith.plan.plan import make_plan
from weightsmith.recipe.schema import Recipe

__all__ = ["Case", "case", "main"]


GIVEN: Mapping[str, Mapping[str, float]] = {"mwa": {"value": 1.0}, "consensus": {"lambda": 1.0}}
"""Parameters that are otherwise read from files or from the task vectors."""


@dataclass(frozen=True)
class Case:
    """One method on made-up experts."""

    stages: tuple[str, ...]
    base: Mapping[str, Tensor]
    deltas: Tensor
    stats: Mapping[str, Tensor]

    @property
    def unit(self) -> float:
        """10^9 parameters and experts."""
        return self.deltas.numel() * len(self.base) / 1e9

    def planned(self) -> Callable[[], Mapping[str, Tensor]]:
        """What merges by weightsmith, in memory and with one thread: the output's tensors (of a codec: its parts)."""
        names = [f"e{i}" for i in range(len(self.deltas))]
        experts = {
            name: MemorySource({key: tensor + delta for key, tensor in self.base.items()}, name)
            for name, delta in zip(names, self.deltas, strict=True)
        }
        stats = {
            stat: {n: MemorySource(dict.fromkeys(self.base, one), stat) for n, one in zip(names, found, strict=True)}
            for stat, found in self.stats.items()
        }
        inputs = Inputs(MemorySource(self.base, BASE), experts, stats)
        recipe = Recipe.model_validate(
            {
                "base": BASE,
                "models": {name: name for name in names},
                "method": [{"name": s, "parameters": GIVEN.get(s, {})} for s in self.stages],
            }
        )
        encode = issubclass(registered()[self.stages[-1]], Codec)
        plan = make_plan(recipe, sources=inputs, threads=1, encode=encode)

        def merge() -> Mapping[str, Tensor]:
            sink = MemorySink()
            carry_out(plan, inputs, sink)
            return sink.tensors()

        return merge

    def plain(self) -> Callable[[], Tensor] | None:
        """The plain way, where there is one."""
        own = [name for name in self.stages if name != "task_arithmetic"] or ["task_arithmetic"]
        way = PLAIN.get(own[0])
        (base, *_), stat = self.base.values(), next(iter(self.stats.values()), None)
        experts = base + self.deltas
        return None if way is None else lambda: way(experts, base, stat)


def case(cls: type[Stage], side: int, experts: int) -> Case:
    """A method with as many of the experts as it takes, the tensors it is for and the statistics it needs."""
    traits = cls.traits
    count = next(c for c in (experts, 2, 1) if cls().refusal(checks.Case(c)) is None)
    noise = torch.Generator().manual_seed(1)
    names = ["up_proj", "down_proj"] if issubclass(cls, GroupMethod) else ["w"]
    base = {f"layers.0.mlp.{n}.weight": torch.randn(side, side, generator=noise) for n in names}
    rows = torch.randn(count, 2 * side, side, generator=noise)
    positive = rows[:, :side].square
    made = {"gram": lambda: rows.transpose(1, 2) @ rows / (2 * side), "fisher": positive, "second_moment": positive}
    stats = {name: made[name]() for name in traits.needs if name != BASE}
    stages = [traits.name]
    if issubclass(cls, MergedFilter) or (issubclass(cls, Codec) and not issubclass(cls, StandaloneCodec)):
        stages = ["task_arithmetic", traits.name]
    elif issubclass(cls, Filter):
        stages = [traits.name, "task_arithmetic"]
    return Case(tuple(stages), base, task_vectors(side, side, count), stats)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.methods")
    parser.add_argument("names", nargs="*", help="methods, filters and codecs; all if none is given")
    parser.add_argument("--side", type=int, default=768)
    parser.add_argument("--large", type=int, default=2048, help="side of the large matrices; 0: none")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=2, help="rounds; the quickest counts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ratio = "plain way : weightsmith"
    rows = [["method", "CPU s per 10^9 parameters and expert", "plain way", ratio, f"at {options.large}"]]
    for name, cls in registered().items():
        if name == "keep" or (options.names and name not in options.names):
            continue
        case(cls, 16, options.experts).planned()()  # kernels are loaded once
        one = case(cls, options.side, options.experts)
        spent, plain = both(one, options.repeat)
        cells = ["-", "-", "-"]
        if plain is not None:
            cells[:2] = [_short(plain / one.unit), f"{plain / spent:.1f}"]
            if options.large and not costs_of(cls).cubic:
                spent_large, plain_large = both(case(cls, options.large, options.experts), options.repeat)
                assert plain_large is not None
                cells[2] = f"{plain_large / spent_large:.1f}"
        rows.append([name, _short(spent / one.unit), *cells])
        print(" | ".join(rows[-1]), flush=True)
    print("\n" + markdown(rows))
    return 0


def both(one: Case, repeat: int) -> tuple[float, float | None]:
    """Processor seconds of weightsmith, and of the plain way where there is one."""
    plain = one.plain()
    return least(one.planned(), repeat), None if plain is None else least(plain, repeat)


def least(work: Callable[[], object], repeat: int) -> float:
    """Processor seconds of the quickest round."""
    return min(timed(work)[1].cpu for _ in range(repeat))  # type: ignore[arg-type]


def _short(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"


if __name__ == "__main__":
    raise SystemExit(main())
