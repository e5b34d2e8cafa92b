"""Fusion-X: one language model from three that each know one kind of text, with tokenizers of their own.

Three sources, each trained on maths, code or prose, each with pairs of bytes merged as its own texts ask for; a target
that was trained briefly on all, with yet another tokenizer.  It goes on with few texts of all kinds, and learns from
the sources' distributions as the gate weighs them.  Figures are bits per byte of test texts.

Twice: once so, and once where candidates complement each other as well as can be: one vocabulary for all, so that every
position of a source counts, and sources of maths and prose that trained three times as long, so that they are far ahead
on their own kind and far behind on the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from study.train.cells import Figures, Room, table
from study.train.languages import KINDS, Texts, llama, read
from weightsmith.core.settings import Settings
from weightsmith.io.read.open import open_source
from weightsmith.observe.data import read_examples
from weightsmith.observe.model import load_model
from weightsmith.train import fuse
from weightsmith.train.fuse.run import GATE, train_fused
from weightsmith.train.fuse.texts import Tokenizer
from weightsmith.train.recipe import TrainRecipe
from weightsmith.train.run import train as train_model

__all__ = ["study"]

Losses = Mapping[str, list[float]]
"""Kind -> of each test text, nats per byte of what a model predicts."""

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Family:
    """Sizes of the vocabularies, and steps of the sources; shared: one tokenizer, made of texts of all kinds."""

    sizes: Mapping[str, int]
    steps: Mapping[str, int]
    shared: bool = False


FAMILIES = {
    "fuse": Family({"maths": 384, "code": 448, "prose": 512, "target": 320}, dict.fromkeys(KINDS, 500)),
    "fuse-shared": Family(
        dict.fromkeys((*KINDS, "target"), 320), {"maths": 1500, "code": 250, "prose": 1500}, shared=True
    ),  # few programs are soon learnt by heart
}
TITLES = {"fuse": "bits per byte, own vocabularies", "fuse-shared": "bits per byte, one vocabulary, strong sources"}
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
    """Both tables."""
    texts = read(room.data)
    return "\n\n".join(of_family(room, texts, name) for name in FAMILIES)


def of_family(room: Room, texts: Texts, family: str) -> str:
    """The table of one."""
    folders = models(room, texts, family)
    known = {name: nats(folder, texts) for name, folder in folders.items()}
    data = room.folder("fuse/texts", lambda place: few(place, texts)) / "texts.jsonl"

    def cell(label: str, seed: int) -> Figures:
        made = lambda: fused(room, folders, data, texts, GATES[label], seed, known)  # noqa: E731
        return room.figures(f"{family}/{label}-{seed}", made)

    rows = {label: [cell(label, seed) for seed in SEEDS[: room.steps(len(SEEDS))]] for label in GATES}
    alone = {name: [{**bits(own), "seconds": 0.0}] for name, own in known.items()}
    gates = {label: own for label, own in rows.items() if "own source" in own[0]}
    scores = table(TITLES[family], {**alone, **rows}, (*KINDS, "mean", "seconds"))
    return f"{scores}\n\n{table('weights on test texts', gates, ('own source', 'target'))}"


def models(room: Room, texts: Texts, family: str) -> dict[str, Path]:
    """The sources and the target, trained by `weightsmith train`."""
    given = FAMILIES[family]
    every = [text for kind in KINDS for text in texts[kind]["train"][:124]]
    parts = {**{kind: list(texts[kind]["train"]) for kind in KINDS}, "target": every}
    sizes, steps = given.sizes, {**given.steps, "target": 150}

    def make(name: str, place: Path) -> None:
        start = place.parent / f"{name}-start"
        start.mkdir(exist_ok=True)
        tokenizer(every if given.shared else parts[name], sizes[name]).save_pretrained(start)
        llama(list(parts).index(name), sizes[name]).save_pretrained(start)
        recipe = TrainRecipe(model=str(start), data=str(place / "texts.jsonl"), steps=room.steps(steps[name]), batch=16,
                             length=64, every=250, valid=0.0, optimizer={"adamw": {"lr": 3e-3}})  # fmt: skip
        write(place / "texts.jsonl", parts[name])
        loaded = load_model(str(start), device="cpu")
        examples = read_examples(recipe.data, loaded, examples=20000, length=recipe.length)
        train_model(recipe, loaded, examples, place / "model")

    return {name: room.folder(f"{family}/{name}", lambda p, n=name: make(n, p)) / "model" for name in parts}


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
    room: Room, folders: dict[str, Path], data: Path, texts: Texts, given: dict[str, object], seed: int,
    known: Mapping[str, Losses],
) -> Figures:  # fmt: skip
    """The target after it has learned from the others."""
    recipe = fuse.recipe.FuseRecipe(
        target=str(folders["target"]), sources=tuple(str(folders[kind]) for kind in KINDS), data=str(data),
        cache=str(folders["target"].parents[1] / "cache"), steps=room.steps(200), batch=16, length=64, every=100,
        k=20, optimizer={"adamw": {"lr": 1e-3}}, valid=0.0, seed=seed, **{"lm_weight": 0.5, **given},
    )  # fmt: skip
    out = room.home / "fuse" / "made"
    train_fused(recipe, out, Settings(overwrite=True), device="cpu")
    return {**bits(nats(out, texts)), **weights(out, known)}


@torch.no_grad()
def weights(out: Path, known: Mapping[str, Losses]) -> Figures:
    """What a trained gate gives the source of a test text's own kind, and the target; nothing of a rule."""
    if not (out / GATE).is_file():
        return {}
    names = ("target", *KINDS)
    gate = fuse.Gate(len(names))
    gate.load_state_dict({name: open_source(str(out / GATE)).read(name) for name in gate.state_dict()})
    own, target = [], []
    for kind in KINDS:
        given = gate(torch.tensor([known[name][kind] for name in names]).T)
        own.append(float(given[:, names.index(kind)].mean()))
        target.append(float(given[:, 0].mean()))
    return {"own source": mean(own), "target": mean(target)}


def bits(losses: Losses) -> Figures:
    """Means of each kind, and of all."""
    found = {kind: mean(own) / math.log(2) for kind, own in losses.items()}
    return {**found, "mean": mean(found.values())}


@torch.no_grad()
def nats(folder: Path, texts: Texts, pieces: int = 60) -> Losses:
    """A model's losses on test texts."""
    loaded = load_model(str(folder), device="cpu")
    coder = Tokenizer.of(loaded, 128)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind, own in found.items():
        for text in [text[:160] for text in texts[kind]["test"][:pieces]]:
            tokens = coder.read(text, 128)
            logits = loaded.logits(tokens.ids[None], None)[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, tokens.ids[1:], reduction="sum")
            own.append(float(loss) / tokens.scored)
    return found
