"""Ways to train one model for several tasks: each beside its own ablation, and beside merges of the same tasks.

    python -m study.multitask --data FOLDER            a folder as README of the study describes; minutes on two cores
    python -m study.multitask --data FOLDER --only documents merged_texts

FOLDER holds cifar10_12k.npz, sign_digits.npz and omniglot8.npz (images and labels), gsm8k_train.jsonl (question),
humaneval.jsonl.gz (prompt) and tinyshakespeare.txt.  Documents and scenes are drawn here from seeds.  The tables are
printed in Markdown.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import torch

import weightsmith as ws
from weightsmith.train.multitask.build import build, open_body
from weightsmith.train.multitask.data import read_tasks
from weightsmith.train.multitask.recipe import MultiTaskRecipe
from weightsmith.train.multitask.run import fit_system, train_multitask
from weightsmith.train.multitask.system import System

SIDE = 16
SEEDS = (0, 1, 2)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MERGES: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]] = {
    "average": ("linear", [{}]),
    "task arithmetic, auto": ("task_arithmetic", [{"lambda": "auto"}]),
    "task arithmetic, searched": ("task_arithmetic", [{"lambda": x} for x in (0.2, 0.35, 0.5, 0.7, 1.0)]),
    "TIES, searched": ("ties", [{"density": 0.3, "lambda": x} for x in (0.5, 0.8, 1.2, 1.7)]),
    "TSV merge, searched": ("tsvm", [{"scaling": x} for x in (0.4, 0.7, 1.0, 1.4)]),
}
"""Row -> method and what is tried; the best mean score on the validation examples is taken."""


def say(*cells: object) -> None:
    sys.stdout.write("| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells) + " |\n")
    sys.stdout.flush()


def head(title: str, *cells: str) -> None:
    sys.stdout.write(f"\n{title}\n\n")
    say(*cells)
    say(*["---"] * len(cells))


def system_of(recipe: MultiTaskRecipe) -> System:
    tasks = read_tasks(recipe)
    body = open_body(recipe, tasks, device="cpu")
    return build(recipe, body, body.prepared(tasks))


@torch.no_grad()
def scored(system: System, part: str = "test") -> dict[str, float]:
    system.eval()
    return {name: system.score(task, task.parts[part], 32) for name, task in system.tasks.items()}


def run(
    tasks: Mapping[str, Any], steps: int, start: System | None = None, **more: Any
) -> tuple[System, dict[str, float], float]:
    """A trained system, its test scores, and seconds."""
    given = {"every": 10**6, "examples": 1, "batch": 16, "optimizer": {"adamw": {"lr": 2e-3}}, "schedule": "cosine"}
    recipe = MultiTaskRecipe(tasks=dict(tasks), steps=steps, **{**given, **more})
    system = system_of(recipe)
    if start is not None:
        system.load_state_dict(start.state_dict())
    began = time.perf_counter()
    fit_system(recipe, system)
    return system, scored(system), time.perf_counter() - began


def mean(found: Mapping[str, float]) -> float:
    return sum(found.values()) / len(found)


def spread(values: Sequence[float], form: str) -> str:
    """Their mean, and in brackets their standard deviation."""
    return f"{form.format(sum(values) / len(values))} ({form.format(stdev(values))})"


def say_mean(label: str, seeds: Sequence[tuple[Mapping[str, float], float]], form: str = "{:.2f}") -> None:
    """A row of one run per seed, scores and seconds: means, and the spread of the mean score."""
    each = [form.format(sum(own[name] for own, _ in seeds) / len(seeds)) for name in seeds[0][0]]
    say(label, *each, spread([mean(own) for own, _ in seeds], form), f"{sum(t for _, t in seeds) / len(seeds):.0f}")


# --- merges beside the multi-task model ----------------------------------------------------------------


def beside_merges(
    tasks: Mapping[str, Any], warm: int, steps: int, rate: float, room: Path | None = None, **more: Any
) -> None:
    """All start from one base that was trained on all tasks for a while, and go on at a lower rate.

    Each of n experts gets `steps`, the multi-task model n times that.  With a room for the experts' folders a router
    between them learns as long as one expert.  Means of SEEDS, the spread of the mean score in brackets.
    """
    rows: dict[str, list[tuple[dict[str, float], float]]] = {}
    for seed in SEEDS:
        for label, found, took in merged(tasks, warm, steps, rate, room, **more, seed=seed):
            rows.setdefault(label, []).append((found, took))
    for label, seeds in rows.items():
        say_mean(label, seeds)


def merged(
    tasks: Mapping[str, Any], warm: int, steps: int, rate: float, room: Path | None, **more: Any
) -> Iterator[tuple[str, dict[str, float], float]]:
    """Row, test scores and training seconds of one seed."""
    base, before, _ = run(tasks, warm, **more)
    more = {**more, "optimizer": {"adamw": {"lr": rate}}}
    yield "base", before, 0.0
    experts, seconds = {}, 0.0
    found: dict[str, float] = {}
    for name in tasks:
        expert, _, took = one_task(base, tasks, name, steps, **more)
        experts[name], seconds = expert, seconds + took
        found[name] = scored(expert)[name]
    yield "single-task models", found, seconds
    for label, count in {"multi-task": steps * len(tasks), "multi-task, a share of the steps": steps}.items():
        _, found, took = run(tasks, count, base, **more)
        yield label, found, took
    state = {name: p.detach().clone() for name, p in base.base.state_dict().items()}
    models = {name: dict(expert.base.state_dict()) for name, expert in experts.items()}
    for label, (method, tried) in MERGES.items():
        made = [ws.merge(models, method, base=state, **parameters) for parameters in tried]
        best = made[0]
        if len(made) > 1:
            best = max(made, key=lambda one: mean(of_merge(experts, one, "valid")))
        yield label, of_merge(experts, best, "test"), seconds
    if room is not None:
        for name, expert in experts.items():
            expert.base.save_pretrained(room / f"expert-{name}")  # type: ignore[operator]
        by = {"task_expert": {"init_experts_from": [str(room / f"expert-{name}") for name in tasks]}}
        _, found, took = run(tasks, steps, **{**more, "by": by, "optimizer": {"adamw": {"lr": 2e-3}}})
        yield "router between the experts", found, seconds + took


def of_merge(experts: Mapping[str, System], merged: Mapping[str, torch.Tensor], part: str) -> dict[str, float]:
    """Scores of a merged model with the head of each task's expert."""
    found = {}
    for name, expert in experts.items():
        kept = {k: v.clone() for k, v in expert.base.state_dict().items()}
        expert.base.load_state_dict({k: merged[k].to(v.dtype) for k, v in kept.items()})
        found[name] = scored(expert, part)[name]
        expert.base.load_state_dict(kept)
    return found


def one_task(base: System, tasks: Mapping[str, Any], name: str, steps: int, **more: Any) -> tuple[System, None, float]:
    """The base with all its heads, trained on one task alone."""
    given = {"every": 10**6, "examples": 1, "batch": 16, "optimizer": {"adamw": {"lr": 2e-3}}, "schedule": "cosine"}
    recipe = MultiTaskRecipe(tasks=dict(tasks), steps=steps, **{**given, **more})
    system = system_of(recipe)
    system.load_state_dict(base.state_dict())
    began = time.perf_counter()
    only = system.tasks
    system.tasks = {name: only[name]}
    fit_system(recipe.model_copy(update={"tasks": {name: recipe.tasks[name]}}), system)
    system.tasks = only
    return system, None, time.perf_counter() - began


# --- images --------------------------------------------------------------------------------------------


def images(data: Path, room: Path) -> dict[str, Any]:
    """CIFAR-10, signed digits, and the alphabet of Omniglot with the most examples, at 16 x 16."""
    sources: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, file in (("cifar", "cifar10_12k.npz"), ("signs", "sign_digits.npz")):
        with np.load(data / file) as held:
            sources[name] = (held["x_train"][:3000], held["y_train"][:3000])
    with np.load(data / "omniglot8.npz") as held:
        alphabet = sorted(key.removesuffix("/x") for key in held.files if key.endswith("/x"))[0]
        sources["letters"] = (held[f"{alphabet}/x"], held[f"{alphabet}/y"])
    tasks = {}
    for name, (x, y) in sources.items():
        small = torch.from_numpy(np.ascontiguousarray(x)).float()
        small = small[:, None].expand(-1, 3, -1, -1) if small.ndim == 3 else small.permute(0, 3, 1, 2)
        small = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear", antialias=True).round().byte()
        _, y = np.unique(y, return_inverse=True)
        order = np.random.default_rng(0).permutation(len(y))
        spec = {}
        for part, chosen in (("data", order[400:]), ("valid", order[:50]), ("test", order[50:400])):
            np.savez(room / f"{name}-{part}.npz", x=small.numpy()[chosen].transpose(0, 2, 3, 1), y=y[chosen])
            spec[part] = str(room / f"{name}-{part}.npz")
        tasks[name] = spec
    return tasks


def of_merged_images(data: Path, room: Path) -> None:
    import transformers

    tasks = images(data, room)
    torch.manual_seed(0)
    vit = transformers.ViTConfig(image_size=SIDE, patch_size=4, **SIZES)
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(room / "vit")
    head("Images of three kinds: one small ViT, accuracy in percent", "model", *tasks, "mean", "training, s")
    common = {"model": str(room / "vit"), "by": "plain", "sampling": "mixed", "batch": 24}
    beside_merges(tasks, 600, 200, 5e-4, room, **common)


# --- prompts -------------------------------------------------------------------------------------------


def coloured(path: Path, channel: int, count: int, seed: int) -> str:
    """Images of one colour, and whether one of its channels is bright."""
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 256, (count, 1, 1, 3), dtype=np.uint8).repeat(SIDE, 1).repeat(SIDE, 2)
    np.savez(path, x=x, y=(x[:, 0, 0, channel] > 127).astype(int))
    return str(path)


def of_prompts(data: Path, room: Path) -> None:
    """Four examples of a decision on a frozen CLIP of random weights, from prompts of the same or another decision."""
    import transformers

    torch.manual_seed(0)
    text = {"vocab_size": 256, "max_position_embeddings": 32, "eos_token_id": 255, "bos_token_id": 254, **SIZES}
    vision = {"image_size": SIDE, "patch_size": 4, **SIZES}
    transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    ).save_pretrained(room / "clip")
    columns = ("kind", "from scratch", "same decision", "another decision", "both", "200 examples")
    head("Soft prompts, four examples: accuracy in percent, mean of three seeds", *columns)
    for kind in ("text", "visual", "unified"):
        rows = [few_shots(room, kind, seed) for seed in range(3)]
        say(kind, *(sum(column) / 3 for column in zip(*rows, strict=True)))


def few_shots(room: Path, kind: str, seed: int) -> list[float]:
    common = {"model": str(room / "clip"), "batch": 16, "seed": seed, "schedule": "constant"}
    slow, fast = {"optimizer": {"adamw": {"lr": 2e-3}}}, {"optimizer": {"adamw": {"lr": 2e-2}}}
    names = {"candidates": ("dark", "bright")}
    test = coloured(room / "test.npz", 0, 300, 1000)
    full = {n: {"data": coloured(room / f"{n}.npz", c, 200, seed + c), **names} for n, c in (("red", 0), ("green", 1))}
    shots = {"t": {"data": coloured(room / "few.npz", 0, 4, 50 + seed), "valid": test, "test": test, **names}}
    inits: list[str | None] = [None]
    for chosen in (("red",), ("green",), ("red", "green")):
        recipe = MultiTaskRecipe(
            tasks={n: full[n] for n in chosen}, steps=150, every=10**6, examples=1,
            by={"prompt": {"kind": kind, "n_ctx": 4}}, **common, **fast,
        )  # fmt: skip
        out = train_multitask(recipe, room / f"{kind}-{seed}-{'-'.join(chosen)}", device="cpu").out
        inits.append(str(out))
    found = []
    for init in inits:
        by = {"prompt": {"kind": kind, "n_ctx": 4, **({"init": init} if init else {})}}
        found.append(run(shots, 10, **common, **slow, by=by)[1]["t"])
    whole = {"t": {**full["red"], "valid": test, "test": test}}
    return [*found, run(whole, 150, **common, **fast, by={"prompt": {"kind": kind, "n_ctx": 4}})[1]["t"]]


# --- documents -----------------------------------------------------------------------------------------


def documents(room: Path, count: int = 240, side: int = 32) -> dict[str, Any]:
    """Pages of strokes under a shadow and a blur: remove the shadow, remove the blur, or find the ink."""
    draw = np.random.default_rng(0)
    pages, shaded, answers = [], [], {"shadow": [], "blur": [], "ink": []}
    down, across = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    for _ in range(count):
        ink = np.zeros((side, side))
        for _ in range(9):
            top, left, long = draw.integers(1, side - 3), draw.integers(1, side - 12), draw.integers(4, 11)
            if draw.random() < 0.5:
                ink[top : top + 2, left : left + long] = 1
            else:
                ink[left : left + long, top : top + 2] = 1
        paper = np.array([0.95, 0.92, 0.85]) - 0.1 * draw.random(3)
        page = paper * (1 - ink[..., None]) + 0.15 * ink[..., None]
        angle, place = draw.random() * 2 * np.pi, draw.random()
        edge = (np.cos(angle) * (down - 0.5) + np.sin(angle) * (across - 0.5)) * 8 + 2 * (place - 0.5)
        light = (1 - 0.55 / (1 + np.exp(-edge)))[..., None]
        soft = box(box(page))
        pages.append(np.clip(soft * light, 0, 1))
        answers["shadow"].append(soft)
        answers["blur"].append(page * light)
        answers["ink"].append(np.repeat(1 - ink[..., None], 3, 2))
        shaded.append(light)
    tasks = {}
    cuts = {"data": slice(0, count - 60), "valid": slice(count - 60, count - 40), "test": slice(count - 40, count)}
    for name, targets in answers.items():
        tasks[name] = {"metric": "psnr"}
        for part, cut in cuts.items():
            x = (255 * np.stack(pages)[cut]).round().astype(np.uint8)
            np.savez(room / f"{name}-{part}.npz", x=x, target=np.stack(targets)[cut].astype(np.float32))
            tasks[name][part] = str(room / f"{name}-{part}.npz")
    return tasks


def box(image: np.ndarray) -> np.ndarray:
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
    height, width = image.shape[:2]
    return sum(padded[i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9


PRIORS = {"shadow": "background", "blur": "gradient", "ink": "sauvola"}


def of_documents(data: Path, room: Path) -> None:
    tasks = documents(room)
    common = {"net": {"width": 16, "depth": 3}, "by": "conditioned", "sampling": "mixed", "batch": 9}
    head(
        "Documents, one network for three tasks on the same pages: PSNR in dB, three seeds",
        "prior",
        *tasks,
        "mean",
        "s",
    )
    for label, choose in {
        "none": lambda n: "none",
        "noise": lambda n: "noise",
        "fixed, learned": lambda n: "fixed",
        "of the task": lambda n: PRIORS[n],
    }.items():
        of_seeds(label, {n: {**spec, "prior": choose(n)} for n, spec in tasks.items()}, 400, **common)


def of_merged_documents(data: Path, room: Path) -> None:
    tasks = documents(room)
    common = {"net": {"width": 16, "depth": 3}, "by": "conditioned", "sampling": "mixed", "batch": 9}
    head("Documents: the multi-task network beside merges (priors of the task)", "model", *tasks, "mean", "training, s")
    beside_merges({n: {**spec, "prior": PRIORS[n]} for n, spec in tasks.items()}, 200, 150, 5e-4, **common)


# --- scenes --------------------------------------------------------------------------------------------


def scenes(room: Path, count: int = 400) -> dict[str, Any]:
    """Boxes in front of a wall, darker with distance: depth, how bright they are painted, how many there are."""
    draw = np.random.default_rng(1)
    x, depth, greys, kinds = [], [], [], []
    for _ in range(count):
        z = np.linspace(0.7, 1.0, SIDE)[:, None].repeat(SIDE, 1) - 0.2 * draw.random()
        albedo = np.full((SIDE, SIDE, 3), 0.7) + 0.2 * draw.random(3)
        number = int(draw.integers(1, 4))
        for near in sorted(draw.uniform(0.15, 0.6, number), reverse=True):
            top, left, high, wide = (int(v) for v in (*draw.integers(0, SIDE - 6, 2), *draw.integers(4, 9, 2)))
            z[top : top + high, left : left + wide] = near
            albedo[top : top + high, left : left + wide] = 0.4 + 0.6 * draw.random(3)
        x.append(np.clip(albedo * (1.1 - z)[..., None] + 0.02 * draw.normal(size=(SIDE, SIDE, 3)), 0, 1))
        holes = draw.random((SIDE // 4, SIDE // 4)).repeat(4, 0).repeat(4, 1) < 0.2
        depth.append(z)
        greys.append(albedo.mean(2))
        kinds.append((number - 1, holes))
    images = (255 * np.stack(x)).round().astype(np.uint8)
    tasks: dict[str, Any] = {
        "depth": {"metric": "rmse", "invalid": 0.0, "legal": (0.05, 1.2)}, "paint": {"metric": "rmse"}, "count": {}
    }  # fmt: skip
    for part, cut in {"data": slice(0, 300), "valid": slice(300, 320), "test": slice(320, 400)}.items():
        seen = np.stack(depth).astype(np.float32)[cut]
        if part == "data":
            seen = np.where(np.stack([h for _, h in kinds])[cut], np.float32(0), seen)
        answers = {
            "depth": {"target": seen},
            "paint": {"target": np.stack(greys).astype(np.float32)[cut]},
            "count": {"y": np.array([k for k, _ in kinds])[cut]},
        }
        for name, own in answers.items():
            np.savez(room / f"{name}-{part}.npz", x=images[cut], **own)
            tasks[name][part] = str(room / f"{name}-{part}.npz")
    return tasks


def of_scenes(data: Path, room: Path) -> None:
    tasks = scenes(room)
    maps = {name: tasks[name] for name in ("depth", "paint")}
    net = {"net": {"width": 16, "depth": 2}, "batch": 8, "sampling": "mixed"}
    head("Scenes, a decoder on a small network: RMSE (lower is better), three seeds", "decoder", *maps, "mean", "s")
    for label, given in {
        "shared, one layer": {"experts": 1, "memory": False},
        "experts, static gates": {"experts": 4, "gate": "static", "memory": False},
        "experts, dynamic gates": {"experts": 4, "memory": False},
        "and memory": {"experts": 4},
    }.items():
        of_seeds(label, maps, 900, "{:.4f}", **net, by={"task_expert": {"levels": 2, **given}})
    columns = ("trained on", "decoding", "depth", "count", "s")
    head("Scenes as tokens: RMSE of depth, accuracy of the count, three seeds", *columns)
    soft = {"codes": 32, "patch": 4, "width": 48, "vae_steps": 400}
    for label, chosen, more in (
        ("depth", ("depth",), {}),
        ("depth, codes without masking", ("depth",), {"mask": 0.0}),
        ("depth and count", ("depth", "count"), {}),
    ):
        by = {"soft_tokens": {**soft, **more}}
        runs = [run({n: tasks[n] for n in chosen}, 500, **net, by=by, seed=seed) for seed in SEEDS]
        counted = spread([own["count"] for _, own, _ in runs], "{:.1f}") if "count" in chosen else "–"
        for how in (True, False):
            rmse = spread([decoded(system, soft=how) for system, _, _ in runs], "{:.4f}")
            say(label, "soft" if how else "hard", rmse, counted, f"{runs[0][2]:.0f}")


@torch.no_grad()
def decoded(system: Any, *, soft: bool) -> float:
    task = system.tasks["depth"]
    pairs = task.parts["test"]
    out, wanted = torch.stack(system.predict(task, pairs, soft=soft)), torch.stack([p.answer for p in pairs])
    return float((out - wanted).square().mean().sqrt())


# --- texts ---------------------------------------------------------------------------------------------

QUESTIONS: Mapping[str, tuple[str, Callable[[str, str], str], tuple[str, ...]]] = {
    "source": ("Which kind of text is it?", lambda text, kind: kind, ("maths", "code", "prose")),
    "capital": (
        "Is the first letter a capital?",
        lambda text, kind: "yes" if text[0].isupper() else "no",
        ("yes", "no"),
    ),
    "ending": (
        "Is the last letter a vowel?",
        lambda text, kind: "yes" if text[-1] in "aeiouAEIOU" else "no",
        ("yes", "no"),
    ),
}


def texts(data: Path, room: Path) -> dict[str, Any]:
    """Pieces of maths, code and prose, each asked three things."""
    maths = [json.loads(line)["question"] for line in (data / "gsm8k_train.jsonl").read_text().splitlines()[:400]]
    packed = gzip.decompress((data / "humaneval.jsonl.gz").read_bytes()).decode()
    code = [json.loads(line)["prompt"] for line in packed.splitlines()]
    prose = (data / "tinyshakespeare.txt").read_text().split("\n\n")[:400]
    draw = np.random.default_rng(2)
    pieces = []
    for kind, sources in (("maths", maths), ("code", code), ("prose", prose)):
        whole = " ".join(" ".join(sources).split())
        starts = draw.integers(0, len(whole) - 40, 500)
        pieces += [(whole[s : s + 20].strip(" \"'"), kind) for s in starts]
    pieces = [(text, kind) for text, kind in pieces if len(text) > 8]
    order = draw.permutation(len(pieces))
    tasks = {}
    for name, (question, answer, candidates) in QUESTIONS.items():
        tasks[name] = {"instruction": question, "candidates": candidates}
        for part, chosen in (("data", order[300:]), ("valid", order[:50]), ("test", order[50:300])):
            rows = [{"input": pieces[i][0], "output": answer(*pieces[i])} for i in chosen]
            (room / f"{name}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            tasks[name][part] = str(room / f"{name}-{part}.jsonl")
    return tasks


def of_likelihood(data: Path, room: Path) -> None:
    """Three questions on texts, answered by likelihood among candidates: how tasks are mixed, and how balanced."""
    import transformers

    tasks = texts(data, room)
    torch.manual_seed(0)
    transformers.BertModel(
        transformers.BertConfig(vocab_size=256, max_position_embeddings=64, **SIZES)
    ).save_pretrained(room / "bert")
    # Clipping would make every gradient as long as the next, which is what MT-AdamW does.
    common = {"model": str(room / "bert"), "by": "uni_perceiver", "optimizer": {"adamw": {"lr": 1e-3}}, "batch": 18}
    common["clip"] = "none"
    balanced = {"optimizer": {"mt_adamw": {"lr": 1e-3}}}
    heavy = {name: {**spec, "weight": 100.0 if name == "source" else 1.0} for name, spec in tasks.items()}
    head("Likelihood over candidates: accuracy in percent, mean of three seeds", "training", *tasks, "mean", "s")
    for label, chosen, more in (
        ("mixed, AdamW", tasks, {"sampling": "mixed"}),
        ("unmixed, AdamW", tasks, {}),
        ("unmixed, MT-AdamW", tasks, balanced),
        ("mixed, AdamW, first loss times 100", heavy, {"sampling": "mixed"}),
        ("unmixed, AdamW, first loss times 100", heavy, {}),
    ):
        of_seeds(label, chosen, 500, **{**common, **more})


def of_seeds(label: str, tasks: Mapping[str, Any], steps: int, form: str = "{:.2f}", **more: Any) -> None:
    """A row: means over SEEDS, with the spread of the mean score in brackets."""
    say_mean(label, [run(tasks, steps, **more, seed=seed)[1:] for seed in SEEDS], form)


def of_llama(room: Path) -> dict[str, Any]:
    import transformers

    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = transformers.LlamaConfig(vocab_size=256, max_position_embeddings=128, **ends, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(room / "llama")
    return {"model": str(room / "llama"), "answer": 8, "sampling": "concat", "optimizer": {"adamw": {"lr": 2e-3}}}


def of_texts(data: Path, room: Path) -> None:
    tasks, common = texts(data, room), of_llama(room)
    head("Texts of three sources, three questions: accuracy in percent, three seeds", "training", *tasks, "mean", "s")
    alone = []
    for seed in SEEDS:
        each = [run({name: tasks[name]}, 300, **common, by="plain", seed=seed)[1:] for name in tasks]
        alone.append(({name: own[name] for name, (own, _) in zip(tasks, each, strict=True)}, sum(t for _, t in each)))
    say_mean("a model each, without instruction", alone)
    for label, mode in (("one model, without instructions", "none"), ("one model, instructed", "instruction")):
        of_seeds(label, tasks, 900, **common, by={"instruct": {"mode": mode}})


def of_merged_texts(data: Path, room: Path) -> None:
    tasks, common = texts(data, room), of_llama(room)
    head("Texts: the instructed model beside merges of instructed ones", "model", *tasks, "mean", "training, s")
    beside_merges(tasks, 500, 150, 5e-4, **{**common, "by": {"instruct": {"mode": "instruction"}}})


PARTS: Mapping[str, Callable[[Path, Path], None]] = {
    "texts": of_texts, "likelihood": of_likelihood, "documents": of_documents, "scenes": of_scenes,
    "prompts": of_prompts,
    "merged_texts": of_merged_texts, "merged_documents": of_merged_documents, "merged_images": of_merged_images,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m study.multitask", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the images and texts")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in chosen.only:
        with tempfile.TemporaryDirectory() as room:
            began = time.perf_counter()
            PARTS[name](chosen.data, Path(room))
            sys.stdout.write(f"\n{name}: {time.perf_counter() - began:.0f} s\n")


if __name__ == "__main__":
    main()
