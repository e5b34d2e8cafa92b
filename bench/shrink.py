"""Time and memory of `moe shrink` on a made-up mixture of a billion parameters, beside reading and writing alone.

PYTHONPATH=src:tests:. python -m bench.shrink [FOLDER]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.measure import measure

LAYERS, EXPERTS, HIDDEN, INNER, KEPT = 8, 32, 1024, 1280, 24
WAYS = {"reap": (), "m_smoe, not aligned": ("--by", "m_smoe", "--skip-align"), "hc_smoe": ("--by", "hc_smoe")}
GRAMS = ("logits_gram", "outputs_cosine", "means_gram", "gated_means_gram")


def make(folder: Path) -> None:
    """A Qwen3-MoE without attention: all that is written of experts, and their statistics."""
    (folder / "model").mkdir(parents=True)
    (folder / "stats").mkdir()
    generator = torch.Generator().manual_seed(0)
    index, stats = {}, {}
    for layer in range(LAYERS):
        place, tensors = f"model.layers.{layer}.mlp", {}
        tensors[f"{place}.gate.weight"] = torch.randn(EXPERTS, HIDDEN, generator=generator).bfloat16()
        for e in range(EXPERTS):
            for word, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                value = torch.randn(shape, generator=generator).bfloat16()
                tensors[f"{place}.experts.{e}.{word}_proj.weight"] = value
        file = f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
        save_file(tensors, folder / "model" / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        points = torch.randn(EXPERTS, 64, generator=generator)
        stats |= {f"{place}.experts.{gram}": points @ points.T for gram in GRAMS}
        stats |= {f"{place}.experts.{w}": torch.rand(EXPERTS, generator=generator) for w in ("counts", "saliency")}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {"model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": 4}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    notes = {"weightsmith": json.dumps({"stat": "routing", "examples": 1, "rows": 1})}
    save_file(stats, folder / "stats" / "routing.safetensors", notes)


def copied(folder: Path) -> tuple[float, float]:
    """Seconds to read the model and write as much of it as is kept, down to the disk; and of processors."""
    began, before = time.perf_counter(), time.process_time()
    room = int(sum(f.stat().st_size for f in (folder / "model").iterdir()) * KEPT / EXPERTS)
    with (folder / "copy").open("wb") as out:
        for file in sorted((folder / "model").glob("*.safetensors")):
            with file.open("rb") as source:
                while block := source.read(1 << 24):
                    out.write(block[:room])
                    room -= min(room, len(block))
        out.flush()
        os.fsync(out.fileno())
    seconds = time.perf_counter() - began, time.process_time() - before
    (folder / "copy").unlink()
    return seconds


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as place:
        folder = Path(place)
        make(folder)
        layer = 2 * EXPERTS * 3 * HIDDEN * INNER
        print(f"{LAYERS * layer / 2e9:.2f} billion parameters; experts of a layer: {layer / 1e6:.0f} MB, "
              f"bound on memory {(3 * layer + 3e8) / 1e6:.0f} MB")  # fmt: skip
        for name, more in WAYS.items():
            floor = min(copied(folder) for _ in range(2))
            words = ("moe", "shrink", str(folder / "model"), str(folder / "out"), "--stats", str(folder / "stats"))
            words = (*words, "--experts", str(KEPT), "--overwrite", "--quiet", *more)
            used = min((measure([sys.executable, "-m", "weightsmith", *words]) for _ in range(2)), key=lambda u: u.wall)
            ratios = used.wall / floor[0], used.cpu / floor[1]
            print(f"{name:20} {used.wall:5.1f} s ({used.cpu:.1f} s of processors, its start too), reading and writing "
                  f"{floor[0]:.1f} s ({floor[1]:.1f} s): {ratios[0]:.2f} ({ratios[1]:.2f}) x, "
                  f"{used.rss / 1e6:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
