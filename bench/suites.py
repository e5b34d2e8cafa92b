"""How much of a suite's wall time is not the models': 12 methods on 5 tasks, five experts.

    python -m bench.suites --layers 8 --hidden 512 --examples 20

Merging, hashing, caching and loading on one side, evaluation on the other; both grow with the number of weights, so
that the share of a small model says what a large one's is, with as many tokens.  Prints one JSON line: `reads` says how
often a method asks for the models' bytes, `disk_reads` how often the disk gave them in the whole run, which begins with
none of them in memory (0 where the folder lies in memory itself, null where the system does not tell).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

METHODS = {
    "average": "linear",
    "task arithmetic": {"task_arithmetic": {"lambda": 0.4}},
    "TIES": {"ties": {"density": 0.2}},
    "DARE": [{"dare": {"density": 0.5}}, {"task_arithmetic": {"lambda": 0.4}}],
    "DARE-TIES": [{"dare": {"density": 0.5}}, {"ties": {"density": 1.0}}],
    "DELLA": [{"della": {"density": 0.5}}, {"task_arithmetic": {"lambda": 0.4}}],
    "magnitude": [{"magnitude": {"density": 0.5}}, {"task_arithmetic": {"lambda": 0.4}}],
    "breadcrumbs": [{"breadcrumbs": {"density": 0.9}}, {"task_arithmetic": {"lambda": 0.4}}],
    "consensus": [{"task_arithmetic": {}}, {"consensus": {"lambda": 0.4}}],
    "model stock": "model_stock",
    "SCE": {"sce": {"select_topk": 0.5}},
    "RAM": "ram",
}
TASKS = ("math", "coding", "safety", "multilingual", "instruction")


def make(folder: Path, hidden: int, layers: int, examples: int) -> tuple[Path, int]:
    """A base, five experts beside it, and five files of questions; returns the run and the number of weights."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    state = load_file(folder / "base" / "model.safetensors")
    for name in TASKS:
        moved = {
            key: (v.float() + 0.02 * v.float().std() * torch.randn(v.shape)).bfloat16() for key, v in state.items()
        }
        (folder / name).mkdir()
        save_file(moved, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
        items = [{"question": f"{name} {at} " * 4, "choices": [f"yes {at}" * 3, f"no {at}" * 3], "answer": at % 2}
                 for at in range(examples)]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    tasks = {f"own_{name}": {"domain": name, "choices": f"{name}.jsonl"} for name in TASKS}
    run = {"suite": "mergebench", "base": "base", "models": {n: n for n in TASKS}, "tasks": tasks, "methods": METHODS}
    (folder / "run.yaml").write_text(json.dumps(run))
    return folder / "run.yaml", sum(value.numel() for value in state.values())


def forget(files: list[Path]) -> int:
    """Take files out of the system's cache; returns their bytes."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return sum(file.stat().st_size for file in files)


def from_disk() -> int | None:
    """Bytes that the disk has given this process; None where the system does not tell."""
    told = Path("/proc/self/io")
    if not told.exists():
        return None
    return next(int(line.split()[1]) for line in told.read_text().splitlines() if line.startswith("read_bytes"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.suites")
    for name, default in (("hidden", 512), ("layers", 8), ("examples", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    chosen = parser.parse_args()
    from weightsmith.study.suite_bench import bench_suite

    with tempfile.TemporaryDirectory(prefix="weightsmith-suites-") as room:
        run, weights = make(Path(room), chosen.hidden, chosen.layers, chosen.examples)
        models = forget(sorted(Path(room).glob("*/model.safetensors")))
        before, began = from_disk(), time.perf_counter()
        result = bench_suite(run, Path(room) / "out")
        wall, after = time.perf_counter() - began, from_disk()
        evaluated = sum(cost.evaluate_seconds for cost in result.costs.values())
        merged = sum(cost.merge_seconds for cost in result.costs.values())
        reads = {name: cost.read_bytes / models for name, cost in result.costs.items() if cost.read_bytes}
    print(json.dumps({
        "weights": weights, "wall_s": round(wall, 1), "evaluate_s": round(evaluated, 1), "merge_s": round(merged, 1),
        "share_not_models": round(1 - evaluated / wall, 3), "most_reads": round(max(reads.values()), 2),
        "disk_reads": None if before is None or after is None else round((after - before) / models, 2),
        "reads": {name: round(value, 2) for name, value in reads.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
