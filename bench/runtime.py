"""python -m bench.runtime [--text FILE] [--minutes 10] : routed experts and the compressed cache, against plain ones.

Routed: a batch of 8 samples that want 8 different experts, against weights built anew for every sample.  The cache: a
byte-level Llama trained on the text for some minutes, a prompt of 8192 bytes and 24 steps, against DynamicCache.  Both
sides run in one process, in turn; the median step counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.table import markdown
from weightsmith.jobs.compress import compress
from weightsmith.recipe.load import load
from weightsmith.runtime import MiniCache, Routed, XkvCache, compare

__all__ = ["cache_rows", "main", "routed_rows", "trained"]

PROMPT, STEPS = 8192, 24
SIZES = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4,
         "head_dim": 64, "intermediate_size": 704, "vocab_size": 256, "max_position_embeddings": 10000}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runtime", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--text", type=Path, help="a text of 100 kB or more; without it only routed experts run")
    parser.add_argument("--minutes", type=float, default=10, help="of training the small model")
    parser.add_argument("--energies", type=float, nargs="+", default=[0.99, 0.995, 0.999])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(markdown(routed_rows()), flush=True)
    if options.text is not None:
        model = trained(options.text.read_bytes(), options.minutes * 60)
        for dtype in (torch.float32, torch.bfloat16):
            rows = cache_rows(model.to(dtype), options.text.read_bytes(), options.energies)
            print("\n" + markdown(rows), flush=True)
    return 0


def routed_rows(hidden: int = 384, layers: int = 3, experts: int = 8, density: float = 0.1) -> list[list[str]]:
    """Tokens per second of prompts of several lengths, routed and built."""
    rows = [["tokens", "routed, tokens/s", "built, tokens/s", "ratio", "bytes", "whole experts"]]
    with tempfile.TemporaryDirectory() as place:
        model = Routed.load(_twins(Path(place), hidden, layers, experts, density), device="cpu")
        for length, new in ((16, 0), (64, 0), (16, 16)):
            ids = torch.randint(1, 1000, (8, length), generator=torch.Generator().manual_seed(0))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            found = compare(model, inputs, torch.eye(8, experts), new_tokens=new)
            size = (model.sizes["shared"] + model.sizes["branches"], model.sizes["experts"])
            cells = [f"{found.routed:.0f}", f"{found.built:.0f}", f"{found.ratio:.1f}"]
            rows.append([f"8 x {length}, {new} new", *cells, *(f"{n / 1e6:.0f} MB" for n in size)])
    return rows


def _twins(place: Path, hidden: int, layers: int, experts: int, density: float) -> Path:
    import transformers

    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": hidden // 64}
    config = transformers.LlamaConfig(**sizes, intermediate_size=hidden * 11 // 4, vocab_size=1000)
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(place / "base")
    start = {name: value.clone() for name, value in base.state_dict().items()}
    for number in range(experts):
        base.load_state_dict({n: v + 0.002 * torch.randn_like(v) for n, v in start.items()})
        base.save_pretrained(place / f"e{number}")
    recipe = {
        "base": str(place / "base"),
        "models": {f"e{n}": str(place / f"e{n}") for n in range(experts)},
        "method": [{"task_arithmetic": {"lambda": 0.3}}, {"twin": {"density": density}}],
    }
    (place / "recipe.json").write_text(json.dumps(recipe))
    compress(load(place / "recipe.json"), place / "twins", accept_loss=True)
    return place / "twins"


def trained(text: bytes, seconds: float) -> Any:
    """A small Llama that has read a text, all but its last 9000 bytes, for some time."""
    import transformers

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, eos_token_id=None, bos_token_id=None))
    data = torch.frombuffer(bytearray(text[:-9000]), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.95))
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        starts = torch.randint(0, len(data) - 257, (4,)).tolist()
        x = torch.stack([data[start : start + 257] for start in starts])
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * max(0.02, 1 - spent / seconds)
        loss = cross_entropy(model(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def cache_rows(model: Any, text: bytes, energies: list[float]) -> list[list[str]]:
    """Bytes, speed and loss of the text's end with each cache."""
    from transformers import DynamicCache

    data = torch.frombuffer(bytearray(text[-9000:]), dtype=torch.uint8).long()[None]
    made: dict[str, Callable[[], Any]] = {"exact": lambda: DynamicCache(config=model.config)}
    made |= {f"xKV, G = 4, energy {e}": lambda e=e: XkvCache(model, group=4, energy=e) for e in energies}  # type: ignore[misc]
    made["MiniCache"] = lambda: MiniCache(model)
    rows = [[str(model.dtype).removeprefix("torch."), "bytes", "steps/s of exact", "loss of 24 bytes", "ranks"]]
    for name, make in made.items():
        plain, _ = _run(model, data, DynamicCache(config=model.config))
        cache = make()
        step, loss = _run(model, data, cache)
        groups = getattr(cache, "groups", []) if isinstance(cache, XkvCache) and name.startswith("xKV") else []
        ranks = " ".join(f"{g.keys.p.shape[2]}/{g.values.p.shape[2]}" for g in groups if g.keys is not None)
        share = cache.nbytes / cache.exact_nbytes if isinstance(cache, XkvCache) else 1.0
        rows.append([name, f"{share:.3f}", f"{plain / step:.2f}", f"{loss:.3f}", ranks])
        print(" | ".join(rows[-1]), flush=True)
    return rows


@torch.no_grad()
def _run(model: Any, data: Tensor, cache: Any) -> tuple[float, float]:
    """Seconds of the median step, and the mean loss of the bytes that follow the prompt."""
    logits = model(data[:, :PROMPT], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    times, loss = [], 0.0
    for place in range(PROMPT, PROMPT + STEPS):
        loss += float(cross_entropy(logits.float(), data[:, place])) / STEPS
        began = time.perf_counter()
        logits = model(data[:, place : place + 1], past_key_values=cache).logits[:, -1]
        times.append(time.perf_counter() - began)
    return sorted(times)[STEPS // 2], loss


if __name__ == "__main__":
    raise SystemExit(main())
