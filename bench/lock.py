"""python -m bench.lock [--folder DIR] [--repeat 3] : locking 1 GB of bfloat16, against a copy of it with flush."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 5632,
    "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
"""492 million parameters."""


def made(folder: Path) -> Path:
    """The model, of random numbers."""
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        d, f, v, kv = 2048, 5632, 32000, 512
        shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
        for i in range(8):
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
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def timed(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("bench-lock"))
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    root: Path = options.folder.absolute()
    model = made(root / "model")
    program = [sys.executable, "-m", "weightsmith", "lock"]
    floor = [
        sys.executable,
        "-I",
        "-S",
        str(Path(__file__).with_name("floor.py")),
        str(root / "copy" / "file"),
        "--fsync",
    ]
    tiny = [sys.executable, "-c", "import torch, transformers; from weightsmith.protect import run"]
    rows: dict[str, list[float]] = {"copy": [], "start": [], "lock": [], "lock and compare": []}
    for _ in range(options.repeat):
        rows["copy"].append(timed([*floor, str(model / "model.safetensors")]))
        rows["start"].append(timed(tiny))
        for name, more in (("lock", ["--no-compare"]), ("lock and compare", [])):
            shutil.rmtree(root / "out", ignore_errors=True)
            (root / "key").unlink(missing_ok=True)
            rows[name].append(
                timed([*program, str(model), str(root / "out"), "--key", str(root / "key"), "--quiet", *more])
            )
    best = {name: min(times) for name, times in rows.items()}
    for name, value in best.items():
        print(f"{name:<18} {value:6.2f} s")
    print(f"lock less start, in copies: {(best['lock'] - best['start']) / best['copy']:.2f}")


if __name__ == "__main__":
    main()
