"""Fusion-X: one language model from three that each know one kind of text, with tokenizers of their own.

Three sources, each trained on maths, code or prose, each with pairs of bytes merged as its own texts ask for; a target
that was trained briefly on all, with yet another tokenizer.  It goes on with few texts of all kinds, and learns from
the sources' distributions as the gate weighs them.  Figures are bits per byte of test texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from study.train.cells import Figures, Room, table
from study.train.languages import KINDS, Texts, llama, read
from weightsmith.core.settings import Settings
from weightsmith.observe.data import read_examples
from weightsmith.observe.model import load_model
from weightsmith.train import fuse
from weightsmith.train.fuse.run import train_fused
from weightsmith.train.fuse.texts import Tokenizer
from weightsmith.train.recipe import TrainRecipe
from weightsmith.train.run import train as train_model

__all__ = ["study"]

SEEDS = (0, 1)
GATES = {
    "texts alone": {"gate": "average", "lm_weight": 1.0},
    "average of all": {"gate": "average"},
    "least loss alone (top-1)": {"gate": "min_ce"},
    "softmax of the losses": {"gate": "avg_ce"},
    "trained gate": {"gate": {"trained": {"lr": 0.01}}},
    "trained gate, a tenth of the balance": {"gate": {"trained": {"lr": 0.01}}, "feedback_weight": 0.05},
    "trained gate, no balance": {"gate": {"trained": {"lr": 0.01}}, "feedback_weight": 0.0},
}


def study(room: Room) -> str:
    """The table."""
    texts = read(room.data)
    folders = models(room, texts)
    data = room.folder("fuse/texts", lambda place: few(place, texts)) / "texts.jsonl"
    rows = {
        label: [
            room.figures(f"fuse/{label}-{seed}", lambda g=given, s=seed: fused(room, folders, data, texts, g, s))
            for seed in SEEDS[: room.steps(len(SEEDS))]
        ]
        for label, given in GATES.items()
    }  # fmt: skip
    alone = {name: [room.figures(f"fuse/alone-{name}", lambda f=f: bits(f, texts))] for name, f in folders.items()}
    return table("bits per byte", {**alone, **rows}, (*KINDS, "mean", "seconds"))


def models(room: Room, texts: Texts) -> dict[str, Path]:
    """The sources and the target, trained by `weightsmith train`."""
    every = [text for kind in KINDS for text in texts[kind]["train"][:124]]
    parts = {**{kind: list(texts[kind]["train"]) for kind in KINDS}, "target": every}
    sizes = {"maths": 384, "code": 448, "prose": 512, "target": 320}
    steps = {**dict.fromkeys(KINDS, 500), "target": 150}

    def make(name: str, place: Path) -> None:
        start = place.parent / f"{name}-start"
        start.mkdir(exist_ok=True)
        tokenizer(parts[name], sizes[name]).save_pretrained(start)
        llama(list(parts).index(name), sizes[name]).save_pretrained(start)
        recipe = TrainRecipe(model=str(start), data=str(place / "texts.jsonl"), steps=room.steps(steps[name]), batch=16,
                             length=64, every=250, valid=0.0, optimizer={"adamw": {"lr": 3e-3}})  # fmt: skip
        write(place / "texts.jsonl", parts[name])
        loaded = load_model(str(start), device="cpu")
        examples = read_examples(recipe.data, loaded, examples=20000, length=recipe.length)
        train_model(recipe, loaded, examples, place / "model")

    return {name: room.folder(f"fuse/{name}", lambda p, n=name: make(n, p)) / "model" for name in parts}


def tokenizer(texts: Sequence[str], size: int) -> object:
    """Pairs of bytes merged into a vocabulary of `size`."""
    import tokenizers as t
    from transformers import PreTrainedTokenizerFast

    made = t.Tokenizer(t.models.BPE())
    made.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = t.decoders.ByteLevel()
    alphabet = t.pre_tokenizers.ByteLevel.alphabet()
    trainer = t.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made)


def write(file: Path, texts: Sequence[str]) -> None:
    """One text a line; long ones in pieces."""
    pieces = [text[i : i + 160] for text in texts for i in range(0, len(text), 160)]
    file.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces if len(piece) > 40), "utf-8")


def few(place: Path, texts: Texts) -> None:
    """Texts that no model has seen: what the target goes on with."""
    chosen = [text for kind in ("maths", "prose") for text in texts[kind]["train"][-200:-140]]
    write(place / "texts.jsonl", [*chosen, *texts["code"]["train"][-60:]])


def fused(
    room: Room, folders: dict[str, Path], data: Path, texts: Texts, given: dict[str, object], seed: int
) -> Figures:
    """The target after it has learned from the others."""
    recipe = fuse.recipe.FuseRecipe(
        target=str(folders["target"]), sources=tuple(str(folders[kind]) for kind in KINDS), data=str(data),
        cache=str(room.home / "fuse" / "cache"), steps=room.steps(200), batch=16, length=64, every=100, k=20,
        optimizer={"adamw": {"lr": 1e-3}}, valid=0.0, seed=seed, **{"lm_weight": 0.5, **given},
    )  # fmt: skip
    out = room.home / "fuse" / "made"
    found = train_fused(recipe, out, Settings(overwrite=True), device="cpu")
    weights = {f"weight of {one.name}": one.weight for one in found.candidates}
    return {**bits(out, texts), **weights}


@torch.no_grad()
def bits(folder: Path, texts: Texts, pieces: int = 60) -> Figures:
    """Of a model on test texts, per byte of what it predicts."""
    loaded = load_model(str(folder), device="cpu")
    coder = Tokenizer.of(loaded, 128)
    found = {}
    for kind in KINDS:
        nats = scored = 0.0
        for text in [text[:160] for text in texts[kind]["test"][:pieces]]:
            tokens = coder.read(text, 128)
            logits = loaded.logits(tokens.ids[None], None)[0, :-1]
            nats += float(torch.nn.functional.cross_entropy(logits, tokens.ids[1:], reduction="sum"))
            scored += tokens.scored
        found[kind] = nats / scored / math.log(2)
    return {**found, "mean": sum(found.values()) / len(found)}
