"""How quick the studio is: python -m bench.studio [--repeat 5] [--tensors 10000]

Seconds from the start of the process to its address, from there to the first page, and of pages of an inspection of
many tensors; with processor seconds, which a busy machine hardly changes.
"""

from __future__ import annotations

import argparse
import http.cookiejar
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.start import models
from bench.table import markdown

__all__ = ["main"]


def inspection(folder: Path, tensors: int) -> None:
    """Leave a finished inspection of so many tensors, as the queue would."""
    from weightsmith.inspect.run import inspect
    from weightsmith.inspect.show import plain
    from weightsmith.recipe.load import load
    from weightsmith.studio.jobs import Jobs

    found = plain(inspect(load(folder / "ties.yaml")))
    (one,) = found["tensors"].values()
    many = {f"model.layers.{i // 10}.part{i % 10}.up_proj.weight": one for i in range(tensors)}
    job = Jobs(folder / ".weightsmith-studio", folder).add(["inspect", "ties.yaml", "--json"], "many tensors")
    (job.folder / "out").write_text(json.dumps({**found, "tensors": many}, default=vars))
    (job.folder / "done").write_text('{"code": 0, "ended": 0}')


def one(folder: Path) -> dict[str, float]:
    """Seconds of one server."""
    words = [sys.executable, "-m", "weightsmith", "studio", str(folder), "--no-browser", "--port", "0"]
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        took = {"start": time.perf_counter() - began}
        took["start, processor"] = _processor(process.pid)
        address = re.search(r"http://\S+", line)
        if address is None:
            raise SystemExit("bench: the studio printed no address")
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        home = address[0].partition("/?")[0]
        for name, url in (("first page", address[0]), ("models again", f"{home}/models"),
                          ("inspection, first", f"{home}/inspect/0001"), ("inspection, again", f"{home}/inspect/0001"),
                          ("inspection, filter and sort", f"{home}/inspect/0001?q=layers.7+part3&sort=2")):  # fmt: skip
            began, before = time.perf_counter(), _processor(process.pid)
            opener.open(url).read()
            took[name] = time.perf_counter() - began
            if "first" in name:
                took[f"{name}, processor"] = _processor(process.pid) - before
        took["torch loaded"] = float("libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
        return took
    finally:
        process.terminate()
        process.wait()


def _processor(pid: int) -> float:
    """Seconds of the processor that a process has used."""
    return sum(map(float, Path(f"/proc/{pid}/stat").read_text().split()[13:15])) / os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.studio", description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tensors", type=int, default=10_000)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        models(Path(folder))
        inspection(Path(folder), options.tensors)
        found = [one(Path(folder)) for _ in range(options.repeat)]
    rows = [["seconds", "median", "least"]]
    for name in found[0]:
        values = [took[name] for took in found]
        rows.append([name, f"{median(values):.3f}", f"{min(values):.3f}"])
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
