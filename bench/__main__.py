"""python -m bench [--size small] [--experts 12] [--methods linear ties] [--repeat 5] [--no-mergekit] [--cold]"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from bench.agree import Agreement
from bench.measure import BenchError
from bench.mergekit import PACKAGES, mergekit_python
from bench.merges import MERGES
from bench.models import SHAPES
from bench.plot import plot
from bench.series import Bench, Memory, Run
from bench.table import agreement_rows, markdown, memory_rows, ratio_rows, usage_rows


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    root = options.folder.absolute()
    root.mkdir(parents=True, exist_ok=True)
    try:
        rival = None if options.no_mergekit else mergekit_python(root / "mergekit-venv")
        bench = Bench(root, rival, options.cold)
        return _run(bench, options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


def _run(bench: Bench, options: argparse.Namespace) -> int:
    merges = [MERGES[name] for name in options.methods]
    print(_heading(options), flush=True)
    bench.warm_up(merges)
    exact = {m.name: bench.exact(m) for m in merges} if bench.rival and not options.unchecked else {}
    runs: list[Run] = []
    agreements: dict[str, Agreement] = {}
    for merge in merges:
        runs += bench.repeat(merge, options.size, options.experts, options.repeat, _say)
        if bench.rival:
            agreements[merge.name] = bench.agreement(merge, options.size, options.experts)
        bench.clear()
    size = "flat" if options.size == "full" else options.size
    memory = [bench.memory(m, size, n) for m in merges if m.most is None for n in options.memory]
    tables = [
        ("Whole processes, medians", usage_rows(runs)),
        ("Ratios, pair by pair: median (smallest to largest)", ratio_rows(runs)),
        *([("Peak memory against the plan", memory_rows(memory))] if memory else []),
        *([("Agreement of the two outputs", agreement_rows(agreements, exact))] if bench.rival else []),
    ]
    text = "\n\n".join([_heading(options), *(f"{title}:\n\n{markdown(rows)}" for title, rows in tables)])
    print("\n" + text)
    (bench.root / "results.md").write_text(text + "\n")
    (bench.root / "results.json").write_text(json.dumps(_record(options, runs, memory, agreements, exact), indent=1))
    written = [bench.root / "results.json", bench.root / "results.md"]
    if bench.rival:
        written.append(bench.root / "results.svg")
        written[-1].write_text(plot(runs))
    print("\nwritten: " + ", ".join(map(str, written)))
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="weightsmith against mergekit and a copy")
    parser.add_argument("--size", choices=SHAPES, default="full", help="full: 0.5 B parameters; small: 28 M")
    parser.add_argument("--experts", type=int, default=3, metavar="N", help="experts beside the base (slerp takes one)")
    parser.add_argument(
        "--methods", nargs="+", choices=MERGES, default=list(MERGES), metavar="NAME", help=", ".join(MERGES)
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds; each program runs once in each")
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[3, 12], metavar="N", help="experts of the memory check"
    )
    parser.add_argument("--no-mergekit", action="store_true", help="measure weightsmith and the copies only")
    parser.add_argument("--unchecked", action="store_true", help="leave out the float32 comparison with mergekit")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before each run")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="models, outputs, results")
    return parser.parse_args(arguments)


def _say(run: Run) -> None:
    used = run.usage
    print(
        f"{run.merge:16}{run.program:14}{run.repetition + 1:3}{used.wall:9.2f} s wall{used.cpu:9.2f} s CPU"
        f"{used.rss / 1e6:8.0f} MB   load {used.load:.1f}",
        flush=True,
    )


def _heading(options: argparse.Namespace) -> str:
    against = "without mergekit" if options.no_mergekit else " and ".join(PACKAGES)
    cache = "cold" if options.cold else "warm"
    return (
        f"{datetime.date.today()}, {_machine()}; {options.size} models in bfloat16, base + {options.experts} experts, "
        f"{cache} page cache, {options.repeat} rounds; {against}"
    )


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    name = names[0] if names else platform.machine()
    return f"{cores} cores ({name}), {memory:.0f} GiB, Python {platform.python_version()}"


def _record(
    options: argparse.Namespace,
    runs: list[Run],
    memory: list[Memory],
    agreements: dict[str, Agreement],
    exact: dict[str, tuple[int, int]],
) -> dict[str, object]:
    return {
        "heading": _heading(options),
        "runs": [asdict(run) for run in runs],
        "memory": [asdict(one) for one in memory],
        "agreement": {name: asdict(one) for name, one in agreements.items()},
        "exact": {name: {"entries": entries, "left_to_the_sort": free} for name, (entries, free) in exact.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
