"""What merges of large models cost: python -m bench.capacity [--folder .bench]

Checkpoints of Llama 3's shapes are written as headers and holes (sparse files, some megabytes in all), and
`weightsmith plan` is asked what merging them takes: bytes read and written, memory, processor seconds.  Times follow:

    seconds = max(bytes / speed of the storage, processor seconds / cores)

since reading, calculating and writing go on at once.  The same formula is held against the runs in results.json of
`python -m bench`, with the copy's bytes per second for the speed of the storage.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import BenchError, plain_environment
from bench.merges import MERGES
from bench.series import COPY, DURABLE, OURS, WEIGHTSMITH
from bench.table import markdown
from weightsmith.core.keys import Key
from weightsmith.io.write.layout import indices, plan_shards
from weightsmith.plan.cost import READ, START, WRITE

__all__ = ["MODELS", "Llama", "Planned", "checked", "node_rows", "planned", "seconds", "time_rows"]

SHARD = 5 * 10**9
SPEEDS = (0.2e9, 1e9, 3e9, 7e9)
"""Bytes per second: network storage, SATA or cloud SSD, NVMe, fast NVMe."""
CORES = 8
NODES = (1, 2, 4, 8, 16)
SHARED = 10e9
"""Bytes per second that storage gives to a whole cluster."""
EXPERTS = 3


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama 3 model; embeddings and head are apart."""

    layers: int
    hidden: int
    inner: int
    narrow: int = 1024  # of keys and values
    words: int = 128256

    def tensors(self) -> Iterator[Key]:
        """Every tensor, in bfloat16."""
        h, blocks = self.hidden, range(self.layers)
        shapes = {"input_layernorm": (h,), "post_attention_layernorm": (h,), "mlp.down_proj": (h, self.inner)}
        shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (self.inner, h))
        shapes |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (self.narrow, h))
        shapes |= dict.fromkeys(("self_attn.o_proj", "self_attn.q_proj"), (h, h))
        found = {f"model.layers.{i}.{name}": shape for i in blocks for name, shape in shapes.items()}
        outer = {"model.embed_tokens": (self.words, h), "model.norm": (h,), "lm_head": (self.words, h)}
        return (Key(f"{name}.weight", shape, "bfloat16") for name, shape in (found | outer).items())


MODELS: Mapping[str, Llama] = {
    "8B": Llama(32, 4096, 14336),
    "70B": Llama(80, 8192, 28672),
    "405B": Llama(126, 16384, 53248),
}


@dataclass(frozen=True)
class Planned:
    """What `weightsmith plan` says of one merge, and how long it took to say it.  Bytes and seconds."""

    read: int
    written: int
    peak: int
    cpu: float
    took: float


def hollow(folder: Path, model: Llama) -> Path:
    """A checkpoint of headers and holes."""
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shards = plan_shards(tuple(model.tensors()), SHARD, "model", {"format": "pt"})
        for shard in shards:
            with (folder / shard.name).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
        for name, text in indices(shards).items():
            (folder / name).write_text(text)
        (folder / "config.json").write_text("{}")
    return folder


def planned(recipe: Path) -> Planned:
    """Ask for a plan; `cpu` is what is left of its seconds without starting and moving bytes."""
    began = time.perf_counter()
    asked = [str(WEIGHTSMITH), "plan", str(recipe), "--json", "--threads", "2"]
    done = subprocess.run(asked, env=plain_environment(), capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"problems": done.stderr}
    if found["problems"]:
        raise BenchError(f"{recipe}: {found['problems']}")
    read, written = int(found["read_bytes"]), int(found["write_bytes"])
    cpu = max(0.0, float(found["seconds"]) - START - (READ * read + WRITE * written) / 1e9)
    return Planned(read, written, int(found["peak_bytes"]), cpu, took)


def seconds(plan: Planned, speed: float, cores: int) -> float:
    """How long reading, calculating and writing take side by side; moving bytes takes processor time as well."""
    moving = (READ * plan.read + WRITE * plan.written) / 1e9
    return max((plan.read + plan.written) / speed, (plan.cpu + moving) / cores)


def time_rows(plans: Mapping[tuple[str, str], Planned]) -> list[list[str]]:
    """A row per model and merge: bytes, memory, times at every speed."""
    rows = [["model", "merge", "read GB", "written GB", "memory GB", *(f"{s / 1e9:g} GB/s" for s in SPEEDS), "plan s"]]
    for (model, merge), plan in plans.items():
        times = [_time(seconds(plan, speed, CORES)) for speed in SPEEDS]
        gigabytes = [f"{plan.read / 1e9:.0f}", f"{plan.written / 1e9:.0f}", f"{plan.peak / 1e9:.1f}"]
        rows.append([model, merge, *gigabytes, *times, f"{plan.took:.1f}"])
    return rows


def node_rows(plans: Mapping[tuple[str, str], Planned]) -> list[list[str]]:
    """A row per model and merge: times on so many Ray nodes, and from how many on the storage is what one waits for."""
    rows = [["model", "merge", *(f"{n} node{'s' if n > 1 else ''}" for n in NODES), "storage is the limit from"]]
    for (model, merge), plan in plans.items():
        times = [_time(seconds(plan, SHARED, CORES * n)) for n in NODES]
        floor = seconds(plan, SHARED, 10**9)
        enough = next((n for n in range(1, 10**4) if seconds(plan, SHARED, CORES * n) <= floor), 10**4)
        rows.append([model, merge, *times, f"{enough} node{'s' if enough > 1 else ''}"])
    return rows


def checked(results: Mapping[str, Any], plans: Mapping[str, Planned], cores: int) -> list[list[str]]:
    """Predicted and measured seconds of the runs of `python -m bench`, without starting."""
    rows = [["merge", "copy GB/s", "predicted s", "measured s", "measured : predicted"]]
    for merge, plan in plans.items():
        walls = [(r["program"], r["usage"]["wall"]) for r in results["runs"] if r["merge"] == merge]
        ours, copy = ([wall for who, wall in walls if who in asked] for asked in ((OURS,), (COPY, DURABLE)))
        if not ours or not copy:
            continue
        speed = (plan.read + plan.written) / min(copy)
        guess, took = START + seconds(plan, speed, cores), sorted(ours)[len(ours) // 2]
        rows.append([merge, f"{speed / 1e9:.1f}", f"{guess:.1f}", f"{took:.1f}", f"{took / guess:.2f}"])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description="what large merges cost")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="models, recipes, results")
    root = parser.parse_args(arguments).folder.absolute()
    plans = {}
    for name, model in MODELS.items():
        folders = [hollow(root / "hollow" / name / one, model) for one in ("base", *"abcdefgh"[:EXPERTS])]
        for merge in MERGES.values():
            recipe = merge.recipe(root / "recipes" / f"capacity-{name}-{merge.name}.json", folders[0], folders[1:])
            plans[name, merge.name] = planned(recipe)
    tables = [markdown(time_rows(plans)), markdown(node_rows(plans))]
    results = root / "results.json"
    if results.exists():
        base, *experts = [root / "models" / "full-bfloat16" / name for name in _bench_models(root)]
        recipes = {
            m.name: m.recipe(root / "recipes" / f"capacity-{m.name}.json", base, experts) for m in MERGES.values()
        }
        found = {name: planned(recipe) for name, recipe in recipes.items()}
        tables.append(markdown(checked(json.loads(results.read_text()), found, 2)))
    text = "\n\n".join(tables) + "\n"
    (root / "capacity.md").write_text(text)
    print(text)
    return 0


def _bench_models(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "models" / "full-bfloat16").iterdir())[: EXPERTS + 1]


def _time(value: float) -> str:
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"


if __name__ == "__main__":
    sys.exit(main())
