"""python -m bench.search FOLDER [--what candidates|own|pool --candidates 100 --blocks 24]: what a search costs.

candidates  processor seconds to build a candidate that differs from others in numbers only, against a merge by itself
own         seconds of every sampler and the journal
pool        peak memory of Frank-Wolfe over pools of 4 and 24 checkpoints
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from weightsmith.cli.process import own_process
from weightsmith.jobs.merge import run
from weightsmith.recipe.schema import Recipe
from weightsmith.search.run import prepared
from weightsmith.search.schema import SearchFile
from weightsmith.search.score import Scorer

FEW = 21
"""Candidates of the search that loads the libraries: as many as `map` needs."""


def model(folder: Path, seed: int, blocks: int, width: int = 896) -> None:
    """A stack of bfloat16 matrices as large as Qwen2-0.5B's (24 blocks: 0.36e9 in the blocks, 0.14e9 embeddings)."""
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (151_936, width)}
    for i in range(blocks):
        for name, shape in (("q", (width, width)), ("o", (width, width)), ("k", (128, width)), ("v", (128, width))):
            shapes[f"model.layers.{i}.self_attn.{name}_proj.weight"] = shape
        for name, shape in (("gate", (4864, width)), ("up", (4864, width)), ("down", (width, 4864))):
            shapes[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
    save_file({n: torch.randn(s, generator=draw).bfloat16() for n, s in shapes.items()}, folder / "model.safetensors")


def candidates(folder: Path, count: int, blocks: int, method: str) -> None:
    """Print processor seconds of candidates beside those of single merges, in turn in this process."""
    own_process()
    for i, name in enumerate(("base", "a", "b", "c")):
        model(folder / name, i, blocks)
    recipe: dict[str, Any] = {
        "base": str(folder / "base"), "models": {n: str(folder / n) for n in "abc"}, "method": method
    }  # fmt: skip
    score = {"command": "true {data}", "data": data(folder)}
    file = {"recipe": recipe, "space": {"weight": {"low": 0.0, "high": 1.0, "per": "model"}}, "score": score,
            "sampler": "random", "evaluations": count, "batch": 8, "together": 8, "rescore": 0,
            "controls": False}  # fmt: skip
    alone: list[float] = []

    def single() -> None:
        weight = {"weight": 0.1 + 0.01 * len(alone)}
        began = time.process_time()
        run(Recipe.model_validate({**recipe, "parameters": weight}), folder / "single", overwrite=True)
        alone.append(time.process_time() - began)

    single()
    alone.clear()  # imports, and the first look at the files
    for kind in ("memory", "folders"):
        out = folder / f"search-{kind}"
        shutil.rmtree(out, ignore_errors=True)
        single()
        scorer = Scorer(["score"], lambda *given: 0.0, [], "bench", in_memory=kind == "memory", apart=True)
        work = prepared(SearchFile.model_validate(file), out, score=scorer)
        began = time.process_time()
        with work.alone():
            work.run()
        each = (time.process_time() - began) / work.evaluations.cost.evaluations
        single()
        one = statistics.fmean(alone[-2:])
        print(f"in {kind}: {each:.2f} s a candidate, {one:.2f} s a single merge, ratio {each / one:.2f}", flush=True)
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


def data(folder: Path) -> dict[str, str]:
    """Two files that stand for data."""
    for name in ("dev", "test"):
        (folder / name).write_text(name)
    return {"search": str(folder / "dev"), "report": str(folder / "test")}


def own(folder: Path, count: int) -> None:
    """Print what a search takes besides building and scoring, for each sampler: its share of scores of 1 s each.

    What libraries take to load is taken before, by a short search, and told by itself.
    """
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b", "c"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        small = {f"layers.{i}.w.weight": rng.standard_normal((8, 8)).astype(np.float32) for i in range(4)}
        save_numpy(small, folder / name / "model.safetensors")
    recipe = {"base": str(folder / "base"), "models": {n: str(folder / n) for n in "abc"}, "method": "task_arithmetic"}
    for sampler, goals in (("random", 1), ("tpe", 1), ("cmaes", 1), ("gp", 1), ("nsga2", 2), ("nsga3", 2), ("map", 2)):
        names = ["x", "y"][:goals]
        file = {"recipe": recipe, "space": {"weight": {"low": 0.0, "high": 1.0, "per": "model"}},
                "score": {"command": "true {data}", "data": data(folder)}, "goals": dict.fromkeys(names, "max"),
                "sampler": sampler, "rescore": 0, "controls": False}  # fmt: skip

        def score(tensors: Any, *rest: Any, names: Any = names) -> dict[str, float]:
            first = tensors["layers.0.w.weight"]
            return {name: 1 / (1 + float(first[0, i] ** 2)) for i, name in enumerate(names)}

        took: list[tuple[float, float]] = []
        for many in (FEW, count):
            out = folder / f"own-{sampler}"
            shutil.rmtree(out, ignore_errors=True)
            asked = SearchFile.model_validate(file | {"evaluations": many})
            began = time.process_time(), time.perf_counter()
            work = prepared(asked, out, score=Scorer(names, score, [], "bench", in_memory=True))
            with work.alone():
                work.run()
            took.append((time.process_time() - began[0], time.perf_counter() - began[1]))
        cpu, wall = took[1]
        print(f"{sampler}: {cpu / count:.4f} s of processor time a candidate, tiny models built and scored included "
              f"({wall / count:.4f} s on the clock); the first {FEW}, libraries and all, {took[0][0]:.2f} s",
              flush=True)  # fmt: skip


def pool(folder: Path) -> None:
    """Print peak memory of Frank-Wolfe over pools of 4 and of 24 checkpoints of 12 million weights."""
    for size in (4, 24):
        subprocess.run([sys.executable, "-m", "bench.search", str(folder), "--what", f"pool-{size}"], check=True)


def _pool(folder: Path, size: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(vocab_size=512, hidden_size=384, intermediate_size=1024, num_hidden_layers=7,
                         num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    names = ["base", *(f"m{i}" for i in range(size))]
    for i, name in enumerate(names):
        if not (folder / name / "model.safetensors").exists():
            torch.manual_seed(i)
            LlamaForCausalLM(config).save_pretrained(folder / name)
            PreTrainedTokenizerFast(tokenizer_object=_letters(), eos_token="\n").save_pretrained(folder / name)
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": f"line {i} of text"}) for i in range(8)))
    for name in ("one.txt", "two.txt"):
        (folder / name).write_text(f"some text of {name}")
    file = {"recipe": {"base": str(folder / "base"), "models": {n: str(folder / n) for n in names[1:]},
                       "method": "task_arithmetic"},
            "sampler": {"frank_wolfe": {"granularity": "layer"}}, "evaluations": 2, "rescore": 0, "controls": False,
            "pool": {"data": {"text": str(folder / "text.jsonl")}, "batch": 4, "length": 16},
            "score": {"bits_per_byte": {"text": {"search": str(folder / "one.txt"),
                                                 "report": str(folder / "two.txt")}}}}  # fmt: skip
    out = folder / f"pool-out-{size}"
    shutil.rmtree(out, ignore_errors=True)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    walk = prepared(SearchFile.model_validate(file), out).sampler
    for _ in range(2):
        walk.tell(walk.ask(1), [[0.0]])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"pool of {size}: peak {peak / 1e3:.0f} MB, {(peak - loaded) / 1e3:.0f} MB above the libraries", flush=True)


def _letters() -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = {chr(i): i for i in range(256)}
    made = Tokenizer(models.WordLevel(letters, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return made


def main() -> None:
    """Measure one of the three."""
    read = argparse.ArgumentParser(prog="bench.search")
    read.add_argument("folder", type=Path)
    read.add_argument("--what", default="candidates", help="candidates, own or pool")
    read.add_argument("--candidates", type=int, default=100)
    read.add_argument("--blocks", type=int, default=24)
    read.add_argument("--method", default="task_arithmetic")
    asked = read.parse_args()
    if asked.what == "own":
        own(asked.folder / "own", asked.candidates)
    elif asked.what == "pool":
        pool(asked.folder / "pool")
    elif asked.what.startswith("pool-"):
        _pool(asked.folder, int(asked.what.removeprefix("pool-")))
    else:
        candidates(asked.folder, asked.candidates, asked.blocks, asked.method)


if __name__ == "__main__":
    main()
