"""python -m bench.lock [--folder DIR] [--repeat 3] : locking 1 GB of bfloat16, against a copy of it with flush."""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 5632,
    "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
"""492 million parameters."""


TINY = CONFIG | {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                 "head_dim": 32, "intermediate_size": 64, "vocab_size": 64}  # fmt: skip
"""What is left of a run when there is nothing to lock: imports, and the proof on a small model."""


def made(folder: Path, config: dict[str, Any]) -> Path:
    """A model of random numbers."""
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        d, f, v = (int(config[n]) for n in ("hidden_size", "intermediate_size", "vocab_size"))
        kv = int(config["num_key_value_heads"]) * int(config["head_dim"])
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
        shapes["lm_head.weight"] = (v, d)
        for i in range(int(config["num_hidden_layers"])):
            own = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
            shapes |= {f"model.layers.{i}.self_attn.{n}.weight": s for n, s in own.items()}
            own = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
            shapes |= {f"model.layers.{i}.mlp.{n}.weight": s for n, s in own.items()}
            shapes |= {f"model.layers.{i}.{n}.weight": (d,) for n in ("input_layernorm", "post_attention_layernorm")}
        draw = torch.Generator().manual_seed(0)
        save_file(
            {n: (torch.randn(s, generator=draw) * 0.02 + (len(s) == 1)).bfloat16() for n, s in shapes.items()},
            folder / "model.safetensors", {"format": "pt"},
        )  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def timed(words: list[str]) -> tuple[float, float]:
    """Seconds on the clock, and of processors."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("bench-lock"))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    root: Path = options.folder.absolute()
    model, tiny = made(root / "model", CONFIG), made(root / "tiny", TINY)
    copy = [sys.executable, "-I", "-S", str(Path(__file__).with_name("floor.py")), str(root / "copy" / "file")]

    def lock(what: Path, *more: str) -> tuple[float, float]:
        shutil.rmtree(root / "out", ignore_errors=True)
        (root / "key").unlink(missing_ok=True)
        words = ["lock", str(what), str(root / "out"), "--key", str(root / "key"), "--quiet", *more]
        return timed([sys.executable, "-m", "weightsmith", *words])

    rows: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.repeat):
        for name, measure in (
            ("copy", lambda: timed([*copy, "--fsync", str(model / "model.safetensors")])),
            ("start", lambda: lock(tiny, "--no-compare")),
            ("lock", lambda: lock(model, "--no-compare")),
            ("start and compare", lambda: lock(tiny)),
            ("lock and compare", lambda: lock(model)),
        ):
            rows.setdefault(name, []).append(measure())
    best = {name: tuple(map(min, zip(*times, strict=True))) for name, times in rows.items()}
    for name, (wall, processors) in best.items():
        print(f"{name:<18} {wall:6.2f} s on the clock {processors:6.2f} s of processors")
    for more in ("", " and compare"):
        ratios = [(best["lock" + more][i] - best["start" + more][i]) / best["copy"][i] for i in (0, 1)]
        print(f"lock{more} less its start, in copies: {ratios[0]:.2f} on the clock, {ratios[1]:.2f} of processors")


if __name__ == "__main__":
    main()
