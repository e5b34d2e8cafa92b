"""Train families of models, then compare every method on them with `weightsmith bench`.

    python -m study                      eight views of scikit-learn's digits, the demo's two families, and questions
    python -m study --data FOLDER        the data sets of a folder of .npz files instead of the eight views, and GSM8K's
                                         problems (gsm8k_train.jsonl, gsm8k_test.jsonl) among the questions
    python -m study --seeds 2            repetitions of each family, where it has as many
    python -m study --only digits text   some of the families

Everything is kept in .study/ (checkpoints, scores, pages); a second run takes seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".study"
FAMILIES = {"images": 1, "digits": 3, "text": 1, "questions": 1}
"""Family -> repetitions, if nothing else is asked for; the digits are the quickest to train."""

Say = Callable[[str], None]


def vision(home: Path, folder: Path | None, seeds: int, say: Say) -> list[Path]:
    """Train the second family, once per seed; returns the study files."""
    import torch
    from demo.family import fingerprint

    from study.data import load
    from study.vision import Training, train

    data, settings = load(folder), Training()
    shapes = [(task.name, {s: len(part.labels) for s, part in task.splits.items()}) for task in data.all]
    pixels = hashlib.sha256(b"".join(task.splits["train"].images.numpy().tobytes() for task in data.all)).hexdigest()
    code = [(ROOT / "study" / name).read_text("utf-8") for name in ("data.py", "vision.py")]
    files = []
    for seed in range(seeds):
        key = fingerprint(asdict(settings), seed, torch.__version__, shapes, pixels, code)
        place = home / ("images" if folder else "lenses") / f"seed{seed}-{key}"
        if not place.is_dir():
            partial = place.with_name(place.name + ".partial")
            partial.mkdir(parents=True, exist_ok=True)
            train(partial, data, seed, settings, lambda text, seed=seed: say(f"seed {seed}: {text}"))  # type: ignore[misc]
            partial.rename(place)
        about = (
            f"{len(data.tasks)} image tasks, {', '.join(task.name for task in data.tasks)}; one residual MLP with a "
            f"frozen head per task, every expert stopped when it had moved {100 * settings.displacement:g}% of the "
            f"base's norm. Forgetting is measured on {', '.join(task.name for task in data.guards)}, which only the "
            "base has learnt."
        )
        title = "Images of unlike kinds" if folder else "Digits under eight lenses"
        models = {t.name: {"model": f"{t.name}.safetensors", "stats": f"stats/{t.name}"} for t in data.tasks}
        study = {
            "title": title,
            "about": about,
            "base": "base.safetensors",
            "models": models,
            "joint": "joint.safetensors",
            "exclude": ["heads.*"],
            "guards": [task.name for task in data.guards],
            "score": "accuracy, %",
            "evaluate": {"function": {"family": "vision", "data": str(folder.resolve()) if folder else ""}},
            "seed": seed,
        }
        files.append(write(place / "study.yaml", study))
    return files


def of_the_demo(home: Path, name: str, seeds: int, say: Say) -> list[Path]:
    """Train a family of the demo, unless `make demo` has; returns the study files."""
    from demo.family import BASE, JOINT

    from study.score import demo_family

    family = demo_family(name, str(home))
    files = []
    for seed in family.seeds[:seeds]:
        folder = family.checkpoints(home, seed, lambda text, seed=seed: say(f"{name}, seed {seed}: {text}"))  # type: ignore[misc]
        study = {
            "title": family.title,
            "about": family.about,
            "base": family.file(folder, BASE).name,
            "models": {task: family.file(folder, task).name for task in family.tasks},
            "joint": family.file(folder, JOINT).name,
            "guards": list(family.guards),
            "score": family.score_name,
            "higher_is_better": family.higher_is_better,
            "evaluate": {"function": {"family": name, "seed": seed, "home": str(home)}},
            "seed": seed,
        }
        files.append(write(folder / "study.yaml", study))
    return files


def asked(home: Path, data: Path | None, seeds: int, say: Say) -> tuple[list[Path], list[Path]]:
    """Train the language models that answer questions; returns the study files, and those of the suite in_the_wild."""
    from study.questions import family

    files, wild = [], []
    for seed in range(seeds):
        folder = family(
            home, ROOT / ".demo" / "text", data, seed, lambda text, seed=seed: say(f"questions, seed {seed}: {text}")
        )  # type: ignore[misc]
        tasks = sorted(path.name.removesuffix(".test.jsonl") for path in folder.glob("*.test.jsonl"))
        common = {"base": "base", "models": {task: task for task in tasks}, "joint": "joint", "seed": seed}
        study = {
            **common,
            "title": "A small Llama that continues texts",
            "about": f"Which of four texts goes on: {', '.join(tasks)}; a byte-level Llama, experts stopped at 2.5%.",
            "score": "accuracy, %",
            "evaluate": {"function": {"family": "questions", "data": str(folder), "seed": seed}},
        }
        files.append(write(folder / "study.yaml", study))
        run = {
            **common,
            "suite": "in_the_wild",
            "title": f"Random subsets of small language models, seed {seed}",
            "subsets": 10,
            "counts": [2, 3, 4, 5],
            "tasks": {task: {"domain": task, "choices": {"file": f"{task}.test.jsonl", "joint": ""}} for task in tasks},
        }
        del run["joint"]
        wild.append(write(folder / "wild.yaml", run))
    return files, wild


def write(file: Path, study: dict[str, object]) -> Path:
    """Write a study; JSON is YAML."""
    file.write_text(json.dumps(study, indent=1) + "\n", "utf-8")
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, then run `weightsmith bench`."""
    parser = argparse.ArgumentParser(prog="python -m study", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of .npz files with images and labels")
    usual = ", ".join(f"{name} {count}" for name, count in FAMILIES.items())
    parser.add_argument("--seeds", type=int, help=f"repetitions of each family, at most ({usual})")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="some of the families")
    chosen = parser.parse_args(arguments)

    import torch

    from weightsmith.cli.main import main as weightsmith

    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    say: Say = lambda text: print(text, flush=True)  # noqa: E731
    files: list[Path] = []
    wild: list[Path] = []
    for name, count in FAMILIES.items():
        seeds = chosen.seeds or count
        if name in chosen.only and name == "images":
            files += vision(HOME, chosen.data, seeds, say)
        elif name in chosen.only and name == "questions":
            studies, wild = asked(HOME, chosen.data, seeds, say)
            files += studies
        elif name in chosen.only:
            files += of_the_demo(ROOT / ".demo", name, seeds, say)
    evaluator = Path(__file__).with_name("score.py")
    out = HOME / "-".join(["bench", *(["data"] if chosen.data else []), *(n for n in FAMILIES if n in chosen.only)])
    code = weightsmith(["bench", *map(str, files), "--evaluator", str(evaluator), "--out", str(out)])
    for at, run in enumerate(wild):
        code = code or weightsmith(["bench", str(run), "--out", str(HOME / f"wild-seed{at}")])
    return code


if __name__ == "__main__":
    sys.exit(main())
