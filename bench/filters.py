"""python -m bench.filters [--size small] [--repeat 3] [NAME ...] : a filter before TIES against TIES alone.

Whole merges of a base and its experts from files into memory, with one thread and in one process with the command
line's settings, in turn with TIES alone.  Processor seconds of the quickest round, without the start; beside their
ratio the one that the plan predicts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.models import SHAPES, make_models
from bench.table import markdown
from weightsmith.cli.process import own_process
from weightsmith.engine.carry import carry_out
from weightsmith.io.write.sink import MemorySink
from weightsmith.jobs.nested import open_inputs
from weightsmith.plan.cost import START
from weightsmith.plan.plan import Plan, make_plan
from weightsmith.recipe.schema import Recipe

__all__ = ["FILTERS", "main"]

FILTERS: Mapping[str, Mapping[str, Any]] = {
    "scale": {"factor": 0.5},
    "dare": {"density": 0.5},
    "magnitude": {"density": 0.5},
    "breadcrumbs": {"density": 0.9},
    "della": {"density": 0.5},
    "agree": {"density": 0.3},
}
"""What stands before TIES."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.filters", description="filters before TIES, against TIES")
    parser.add_argument("names", nargs="*", help=f"{', '.join(FILTERS)}; all if none is given")
    parser.add_argument("--size", choices=SHAPES, default="small", help="small: 28 M parameters")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--scope", choices=("global", "tensor"), default="global", help="of TIES")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="models")
    options = parser.parse_args(arguments)
    own_process()
    base, *experts = make_models(options.folder.absolute() / "models", options.size, options.experts)
    ties = {"ties": {"density": 0.3, "scope": options.scope}}
    alone, predicted = _prepared(base, experts, [ties])
    rows = [["before ties", "CPU s", "of ties alone", "as planned", "planned / measured"]]
    for name in options.names or FILTERS:
        work, planned = _prepared(base, experts, [{name: FILTERS[name]}, ties])
        rounds = [(_cpu(work), _cpu(alone)) for _ in range(options.repeat)]
        ours, theirs = (min(found) for found in zip(*rounds, strict=True))
        found, expected = ours / theirs, planned / predicted
        rows.append([name, f"{ours:.2f}", f"{found:.2f}", f"{expected:.2f}", f"{expected / found:.2f}"])
        print(" | ".join(rows[-1]), flush=True)
    print("\n" + markdown(rows))
    return 0


def _prepared(
    base: Path, experts: Sequence[Path], stages: Sequence[Mapping[str, Any]]
) -> tuple[Callable[[], Any], float]:
    """A merge, and the seconds that its plan predicts behind the start."""
    given = {"base": str(base), "models": {one.name: str(one) for one in experts}, "method": stages}
    recipe = Recipe.model_validate(given)
    inputs = open_inputs(recipe)
    plan: Plan = make_plan(recipe, sources=inputs, threads=1)
    assert plan.seconds is not None
    carry_out(plan, inputs, MemorySink())  # files into the page cache, kernels into theirs
    return lambda: carry_out(plan, inputs, MemorySink()), plan.seconds - START


def _cpu(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    raise SystemExit(main())
