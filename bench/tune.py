"""python -m bench.tune [--hidden 512 --experts 2 4 12] : memory and time of learning coefficients of a language model.

Peak memory is that of a process of its own that tunes for a few steps, with the command line's settings of the
allocator and several numbers of experts; against the parts that it should consist of (the module in float32, its
largest gradient, the activations, and 150 MB), and against what another process predicts as `tune --dry-run` does.
Time is that of one step in parts: refresh (the streaming merge into the module), and within backward the contraction.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from weightsmith.cli.process import for_learning, own_process
from weightsmith.engine.gradient import Pullback
from weightsmith.observe.model import load_model
from weightsmith.tune.api import tune
from weightsmith.tune.job import memory, resident
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


def peak() -> int:
    """Bytes of this process in memory at most; getrusage counts the process that began it, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def loaded_with(folder: Path) -> tuple[Any, list[Batch], Callable[[Any, Batch], Any]]:
    """The base, batches, and how it is run."""
    loaded = load_model(folder / "base")
    draw = torch.Generator().manual_seed(0)
    vocabulary = loaded.config.vocab_size
    data = [Batch(torch.randint(vocabulary, (BATCH, LENGTH), generator=draw)) for _ in range(STEPS)]
    return loaded.module, data, lambda module, batch: module(input_ids=batch.inputs, use_cache=False).logits


def predict(folder: Path, experts: int, queue: Any) -> None:
    """Tell what learning will take; the number of experts is no part of it."""
    own_process()
    for_learning()
    module, data, function = loaded_with(folder)
    queue.put(memory(module, [lambda: function(module, data[0])]))


def run(folder: Path, experts: int, queue: Any) -> None:
    """Tune, and tell peak memory and the time of each part."""
    own_process()
    for_learning()
    spent: dict[str, float] = {"refresh": 0.0, "contraction": 0.0}

    def timed(cls: Any, method: str, name: str) -> None:
        plain = getattr(cls, method)

        def around(*given: Any, **more: Any) -> Any:
            began = time.thread_time()
            try:
                return plain(*given, **more)
            finally:
                spent[name] += time.thread_time() - began

        setattr(cls, method, around)

    timed(Resident, "refresh", "refresh")
    timed(Pullback, "one", "contraction")
    module, data, function = loaded_with(folder)
    held = resident()
    recipe = {"base": str(folder / "base"), "models": {f"e{i}": str(folder / f"e{i}") for i in range(experts)},
              "method": "task_arithmetic"}  # fmt: skip
    began = time.process_time()
    tune(recipe, "adamerging", data={"t": data}, module=module, steps=STEPS, function=function, threads=1)
    whole = time.process_time() - began
    weights = sum(p.numel() * 4 for p in module.parameters())
    queue.put({
        "experts": experts, "peak": peak(),
        "libraries": held - weights, "seconds per step": whole / STEPS,
        "refresh": spent["refresh"] / (STEPS + 1), "contraction": spent["contraction"] / STEPS,
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
        predicted = _apart(context, predict, folder, 0)
        parts = sum(predicted[name] for name in ("module", "largest gradient", "activations")) + (150 << 20)
        print(json.dumps(predicted))
        for experts in given.experts:
            found = _apart(context, run, folder, experts)
            share = (found["refresh"] + found["contraction"]) / found["seconds per step"]
            found |= {"peak / parts": found["peak"] / parts, "peak / predicted": found["peak"] / predicted["in all"],
                      "share of a step": share}  # fmt: skip
            print(json.dumps({name: round(value, 3) for name, value in found.items()}))


def _apart(context: Any, work: Callable[..., None], folder: Path, experts: int) -> dict[str, float]:
    """What a process of its own tells."""
    queue = context.Queue()
    process = context.Process(target=work, args=(folder, experts, queue))
    process.start()
    found: dict[str, float] = queue.get()
    process.join()
    return found


if __name__ == "__main__":
    main()
