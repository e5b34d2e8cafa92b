"""Cases that go through files: recipes, the command line, codecs, adapters, mixtures, tokenizers."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import weightsmith as ws
from weightsmith.cli.main import main

from .cases import Case
from .payload import Part, of_folder, of_tensors
from .recipes import (
    ADAPTERS,
    CODECS,
    DEMO,
    EXPERTS,
    FAMILIES,
    LLAMA,
    MERGEKIT,
    MERGEKIT_MOE,
    MIXTURES,
    RECIPES,
    SWEEPS,
    TRANSPLANTS,
)

Root = Callable[[], Path]
"""The folder of the made-up models, made at first use."""


def command(*words: str | Path) -> None:
    """Run `weightsmith WORDS` in this process; what it says counts only if it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(word) for word in words])
    if code:
        raise RuntimeError(f"weightsmith {' '.join(map(str, words))} ended with code {code}: {said.getvalue()[-500:]}")


# --- the cases ------------------------------------------------------------------------------------


def cases(root: Root) -> Iterator[Case]:
    """Everything that is written to folders."""

    def written(name: str, verb: str, text: str, *words: str, plain: bool = False) -> Case:
        def make(folder: Path) -> list[Part]:
            command(*verb.split(), _recipe(root, text), folder / "out", "--quiet", *words)
            return _parts(root, folder / "out")

        return Case(name, make, plain)

    one = ("--threads", "1")
    for name, text in RECIPES.items():
        yield written(f"recipe: {name}", "merge", text, *one, plain="tokenizer" not in name)
    for name, method in DEMO.items():
        yield written(f"demo: {name}", "merge", f"{LLAMA}method: {method}\nseed: 1", *one)
    for name, (text, sets) in SWEEPS.items():
        yield written(f"sweep: {name}", "merge", text, *one, *(w for s in sets for w in ("--set", s)), plain=True)
    for name, text in MERGEKIT.items():
        yield written(f"mergekit: {name}", "merge", text, *one)
    for name, (kind, methods) in CODECS.items():
        for method in methods:
            yield from _compressed(root, name, f"{FAMILIES[kind]}method: {method}", method, kind)
    for method, more in ADAPTERS:
        adapters = "models:\n  a0: {model: lora/a0, weight: 0.7}\n  a2: lora/a2\n"
        if method in ("cat", "svd", "ties_svd", "knots", "dare_ties_svd"):
            adapters += "  a1: lora/a1\n"
        if method in ("average", "knots"):
            adapters = adapters.replace(", weight: 0.7", "")
        text = f"{adapters}method: {method}"
        yield written(f"lora merge: {method} {more}".strip(), "lora merge", f"{text}\nparameters: {{{more}}}\nseed: 5")
    kept = "models: {a: lora/kept0, b: lora/kept1}\nmethod: "
    yield written("lora merge: modules in full", "lora merge", f"{kept}{{linear: {{saved: average}}}}")
    yield written("lora merge: of one", "lora merge", "models: {a: {model: lora/a1, weight: 0.5}}\nmethod: svd")
    yield from _adapters(root)
    for name, (more,) in MIXTURES.items():
        yield written(f"moe: {name}", "moe", f"base: dense/base\n{more}{EXPERTS}", *one)
    yield written("moe: config of mergekit", "moe", MERGEKIT_MOE, *one)
    for words in TRANSPLANTS:
        yield Case(f"transplant: {' '.join(words)}", _told(root, _transplant(root, words)), False)
    yield written("soup: best two", "soup", LLAMA + "method: average", "--scores", "scores.json", "--size", "2", *one)
    yield Case("recipe: opcm in two runs", _two_runs(root))
    yield Case("soup: greedy", _greedy(root))
    yield Case("python: merge to a folder", _python(root))


def _adapters(root: Root) -> Iterator[Case]:
    def told(verb: str, *words: str) -> Callable[[Path], list[Part]]:
        def make(folder: Path) -> None:
            first, *others = (str(root() / w.removeprefix("@")) if w.startswith("@") else w for w in words)
            command("lora", verb, first, folder / "out", *others, "--quiet")

        return _told(root, make)

    base = ("@dense/e0", "--base", "@dense/base")
    yield Case("lora extract: rank", told("extract", *base, "--rank", "3", "--skip"))
    yield Case("lora extract: energy", told("extract", *base, "--energy", "0.8", "--whole-embeddings", "--skip"))
    uniform = ("--energy", "0.6", "--uniform", "--whole-embeddings", "--dtype", "bfloat16")
    yield Case("lora extract: uniform", told("extract", *base, *uniform))
    yield Case(
        "lora extract: include", told("extract", *base, "--rank", "2", "--include", "*mlp*", "--exclude", "*.1.*")
    )
    yield Case("lora resize: rank", told("resize", "@lora/a1", "--rank", "2"))
    yield Case("lora resize: energy", told("resize", "@lora/a1", "--energy", "0.7", "--dtype", "float16"))
    yield Case("lora average: factors", told("average", "@run"))
    yield Case("lora average: product", told("average", "@run", "--space", "product", "--penalty", "3"))
    yield Case("lora average: steps", told("average", "@run", "--metric", "steps", "--rule", "softmax", "--last", "2"))


def _compressed(root: Root, name: str, text: str, method: str, kind: str) -> Iterator[Case]:
    """The folder of a codec, and every model that comes back out of it."""
    experts = ("a0", "a1") if kind == "lora" else ("e0", "e1", "e2") if method == name else ("e1",)

    def make(folder: Path) -> list[Part]:
        command("compress", _recipe(root, text), folder / "packed", "--threads", "1", "--quiet", "--accept-loss")
        for expert in experts:
            command("restore", folder / "packed", folder / expert, "--expert", expert, "--threads", "1", "--quiet")
        if name == "tall_masks":
            command("restore", folder / "packed", folder / "agreed", "--consensus", "2", "--scale", "0.5", "--quiet")
        return _parts(root, folder)

    yield Case(f"codec: {method}", make, method == name)


def _transplant(root: Root, words: Sequence[str]) -> Callable[[Path], None]:
    method, *others = words

    def make(folder: Path) -> None:
        models = root() / "words/x", root() / "words/donor"
        how = ("--method", method, *others, "--threads", "1", "--quiet")
        command("tokenizer", "transplant", *models, folder / "out", *how)

    return make


def _two_runs(root: Root) -> Callable[[Path], list[Part]]:
    """A merge whose first model is what an earlier run made, and wrote about in weightsmith.json."""

    def make(folder: Path) -> list[Part]:
        first = "base: dense/base\nmodels: {e0: dense/e0, e1: dense/e1}\nmethod: opcm"
        command("merge", _recipe(root, first), folder / "first", "--threads", "1", "--quiet")
        second = f"base: dense/base\nmodels: {{first: {folder / 'first'}, e2: dense/e2}}\nmethod: opcm"
        command("merge", _recipe(root, second), folder / "second", "--threads", "1", "--quiet")
        return _parts(root, folder)

    return make


def _greedy(root: Root) -> Callable[[Path], list[Part]]:
    def make(folder: Path) -> list[Part]:
        paths = {f"e{i}": root() / f"llama/e{i}" for i in range(3)}

        def score(merged: Mapping[str, Any]) -> float:
            return -float(merged["lm_head.weight"].double().square().sum())

        found = ws.greedy_soup(paths, score, method="average", threads=1)
        told = json.dumps([list(found.members), len(found.trials)]).encode()
        return [*of_tensors(found.merged), ("members", "", (), told)]

    return make


def _python(root: Root) -> Callable[[Path], list[Part]]:
    def make(folder: Path) -> list[Part]:
        experts = {f"e{i}": root() / f"odd/e{i}" for i in range(3)}
        ws.merge(experts, ["dare", {"ties": {"density": 0.5}}], base=root() / "odd/base", out=folder / "out", seed=3,
                 dtype="bfloat16", threads=1)  # fmt: skip
        return _parts(root, folder / "out")

    return make


def _told(root: Root, make: Callable[[Path], None]) -> Callable[[Path], list[Part]]:
    def made(folder: Path) -> list[Part]:
        make(folder)
        return _parts(root, folder)

    return made


def _recipe(root: Root, text: str) -> Path:
    """The recipe's file, beside the models."""
    file = root() / "recipe.yaml"
    file.write_text(text)
    return file


def _parts(root: Root, folder: Path) -> list[Part]:
    """What lies in the folder, without the names of temporary folders."""
    place = str(root()).encode(), str(folder.resolve()).encode()
    return [
        (name, dtype, shape, data if dtype else data.replace(place[0], b"ROOT").replace(place[1], b"OUT"))
        for name, dtype, shape, data in of_folder(folder)
    ]
