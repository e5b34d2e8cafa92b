"""python -m bench.tune [--hidden 512 --experts 2 4 12] : memory and time of learning coefficients of a language model.

Peak memory is that of a process of its own that tunes for a few steps, with several numbers of experts, against the
parts that it should consist of: the module in float32, its largest gradient, the activations, and 150 MB.  Time is that
of one step in parts: refresh (the streaming merge into the module), and within backward the contraction.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from weightsmith.engine.gradient import Pullback
from weightsmith.observe.model import load_model
from weightsmith.tune.api import tune
from weightsmith.tune.job import activations, resident
from weightsmith.tune.objective import Batch
from weightsmith.tune.resident import Resident

STEPS, BATCH, LENGTH = 3, 4, 256


def make(folder: Path, experts: int, hidden: int, layers: int, vocabulary: int) -> None:
    """A Llama and its fine-tunes, bfloat16, drawn."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128 or 1,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    names = [name for name, _ in base.named_parameters()]
    for i in range(experts):
        torch.manual_seed(i + 1)
        state = {n: (p + 1e-3 * torch.randn(p.shape)).to(torch.bfloat16) for n, p in base.named_parameters()}
        (folder / f"e{i}").mkdir()
        save_file({n: state[n].detach() for n in names}, folder / f"e{i}" / "model.safetensors", {"format": "pt"})
        (folder / f"e{i}" / "config.json").write_text((folder / "base" / "config.json").read_text())


def run(folder: Path, experts: int, queue: Any) -> None:
    """Tune, and tell peak memory and the time of each part."""
    spent: dict[str, float] = {"refresh": 0.0, "contraction": 0.0}

    def timed(cls: Any, method: str, name: str) -> None:
        plain = getattr(cls, method)

        def around(*given: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return plain(*given, **more)
            finally:
                spent[name] += time.perf_counter() - began

        setattr(cls, method, around)

    timed(Resident, "refresh", "refresh")
    timed(Pullback, "one", "contraction")
    loaded = load_model(folder / "base")
    draw = torch.Generator().manual_seed(0)
    vocabulary = loaded.config.vocab_size
    data = {"t": [Batch(torch.randint(vocabulary, (BATCH, LENGTH), generator=draw)) for _ in range(STEPS)]}
    recipe = {"base": str(folder / "base"), "models": {f"e{i}": str(folder / f"e{i}") for i in range(experts)},
              "method": "task_arithmetic"}  # fmt: skip

    def scored() -> Any:
        return loaded.module(input_ids=data["t"][0].inputs, use_cache=False).logits.log_softmax(-1).sum()

    kept = activations(loaded.module, scored)
    before = dict(spent)
    held = resident()
    began = time.perf_counter()
    tune(recipe, "adamerging", data=data, module=loaded.module, steps=STEPS,
         function=lambda module, batch: module(input_ids=batch.inputs, use_cache=False).logits)  # fmt: skip
    whole = time.perf_counter() - began
    weights = sum(p.numel() * 4 for p in loaded.module.parameters())
    largest = max(p.numel() * 4 for p in loaded.module.parameters())
    queue.put({
        "experts": experts, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "before": held, "parts": weights + largest + kept + (150 << 20), "module": weights, "largest gradient": largest,
        "activations": kept, "seconds per step": whole / STEPS,
        "refresh": (spent["refresh"] - before["refresh"]) / (STEPS + 1), "contraction": spent["contraction"] / STEPS,
    })  # fmt: skip


def main() -> None:
    """Print a line of JSON for each number of experts."""
    reader = argparse.ArgumentParser(prog="bench.tune")
    reader.add_argument("--hidden", type=int, default=512)
    reader.add_argument("--layers", type=int, default=8)
    reader.add_argument("--vocabulary", type=int, default=8192)
    reader.add_argument("--experts", type=int, nargs="+", default=[2, 4, 12])
    given = reader.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, max(given.experts), given.hidden, given.layers, given.vocabulary)
        context = multiprocessing.get_context("spawn")
        for experts in given.experts:
            queue = context.Queue()
            process = context.Process(target=run, args=(folder, experts, queue))
            process.start()
            print(json.dumps(queue.get()))
            process.join()


if __name__ == "__main__":
    main()
