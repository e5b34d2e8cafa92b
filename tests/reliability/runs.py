"""Models to merge, and a way to run the command line on them with faults."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file

HERE = Path(__file__).parent


def shapes(hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (2 * hidden, hidden)}
    for i in range(layers):
        found[f"model.layers.{i}.self_attn.q_proj.weight"] = (hidden, hidden)
        found[f"model.layers.{i}.mlp.up_proj.weight"] = (4 * hidden, hidden)
        found[f"model.layers.{i}.mlp.down_proj.weight"] = (hidden, 4 * hidden)
        found[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,)}


def save_sharded(tensors: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """A model as the hub lays it out: shards with an index, or one file."""
    folder.mkdir(parents=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(tensors)
    index: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


@dataclass
class Scene:
    """A recipe over small models in a folder, a command line, and what it makes.

    words    the command, '{out}' for the output; without them a merge of the recipe
    resumes  whether the command knows --resume
    apart    whether it makes several folders inside the output, each complete for itself
    beside   files that it makes beside the output
    """

    folder: Path
    recipe: Path
    options: tuple[str, ...] = ()
    result: dict[str, str] = field(default_factory=dict)
    """Name -> checksum of every file of the output."""
    words: tuple[str, ...] = ()
    resumes: bool = True
    apart: bool = False
    beside: tuple[str, ...] = ()

    def argv(self, place: Path, *more: str) -> list[str]:
        words = self.words or ("merge", str(self.recipe), "{out}", "--quiet", *self.options)
        return [word.replace("{out}", str(place / "out")) for word in (*words, *more)]

    def again(self, place: Path) -> list[str]:
        """What is typed after a run that was stopped."""
        if self.resumes:
            return self.argv(place, "--resume")
        return self.argv(place, *(["--overwrite"] if (place / "out").exists() else []))


def make_scene(
    folder: Path, method: str, *, hidden: int, layers: int, shard: str, shards: int = 2, options: Sequence[str] = ()
) -> Scene:
    generator = torch.Generator().manual_seed(0)
    wanted = shapes(hidden, layers)
    base = {name: torch.randn(shape, generator=generator) for name, shape in wanted.items()}
    for model in ("base", "math", "code", "law"):
        change = 0.0 if model == "base" else 0.02
        tensors = {n: (b + change * torch.randn(b.shape, generator=generator)).bfloat16() for n, b in base.items()}
        save_sharded(tensors, folder / model, shards)
        (folder / model / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n# {model}\n")
    config = {"model_type": "llama", "vocab_size": 2 * hidden, "hidden_size": hidden, "num_hidden_layers": layers,
              "intermediate_size": 4 * hidden, "tie_word_embeddings": True}  # fmt: skip
    (folder / "base/config.json").write_text(json.dumps(config))
    (folder / "base/generation_config.json").write_text("{}")
    recipe = folder / "recipe.yaml"
    models = "".join(f"  {name}: {folder / name}\n" for name in ("math", "code", "law"))
    recipe.write_text(
        f"base: {folder / 'base'}\nmodels:\n{models}method: {method}\nexclude: ['*norm*']\n"
        f"output: {{shard_size: {shard}}}\n"
    )
    return Scene(folder, recipe, tuple(options))


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code (minus the signal), its calls to the file system, what it said."""

    code: int
    calls: int | None
    seconds: float
    stderr: str
    stdout: str


class Zygote:
    """The process of `zygote.py`, and runs in its children."""

    def __init__(self, folder: Path, warm: Sequence[Scene] = ()) -> None:
        self.folder = folder
        self.number = 0
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            for scene in warm:
                self.warm(scene)
        except BaseException:
            self.close()
            raise

    def warm(self, scene: Scene) -> None:
        """Run a scene in the process itself, so that all it needs is loaded there, and keep what it makes."""
        place = self.folder / f"warm-{self.number}"
        place.mkdir(parents=True)
        ended = self.ask({"argv": scene.argv(place), "warm": True, "log": str(place / "log")})
        assert ended["code"] == 0, (place / "log.err").read_text()
        scene.result = digest(place / "out")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.number += 1
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def run(self, argv: Sequence[str], **how: Any) -> Ended:
        """`how`: fault, signal, patch; see zygote.py."""
        log = self.folder / "log"
        answer = self.ask({"argv": list(argv), "log": str(log), **how})
        assert answer["code"] not in (99, -1000), log.with_suffix(".err").read_text() or "hung"
        said = log.with_suffix(".err").read_text(), log.with_suffix(".out").read_text()
        return Ended(answer["code"], answer["calls"], answer["seconds"], *said)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, which some test has reported
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def digest(folder: Path) -> dict[str, str]:
    """Relative name -> checksum of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in files}


OLD = {"notes.txt": "what was there before", "sub/more.txt": "and more"}


def put_old(place: Path) -> dict[str, str]:
    """An output folder that is there already."""
    for name, text in OLD.items():
        path = place / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return digest(place / "out")


def state(place: Path, scene: Scene, old: dict[str, str] | None = None) -> str:
    """'complete', 'old', 'absent', or 'moved' (the old output, whole, under its other name and the new one complete).

    Anything else fails: there is no moment at which OUT is something else.
    """
    out = place / "out"
    if scene.apart:
        return _state_of_parts(out, scene)
    if out.exists():
        found = digest(out)
        assert found in (scene.result, old), f"out is neither old nor new: {sorted(found)}"
        return "complete" if found == scene.result else "old"
    if old is None:
        return "absent"
    (moved,) = place.glob("out.replaced-*")
    assert digest(moved) == old
    assert digest(place / "out.partial/files") == scene.result
    return "moved"


def _state_of_parts(out: Path, scene: Scene) -> str:
    """The same of an output that is several folders: each of them is there as a whole or not at all."""
    there = [path for path in out.iterdir() if ".partial" not in path.name] if out.exists() else []
    for part in there:
        wanted = {name: sum_ for name, sum_ in scene.result.items() if name.startswith(f"{part.name}/")}
        assert {f"{part.name}/{name}": sum_ for name, sum_ in digest(part).items()} == wanted, part
    parts = {name.split("/")[0] for name in scene.result}
    return "complete" if {path.name for path in there} == parts else "absent"


def finish(zygote: Zygote, scene: Scene, place: Path, *more: str, **how: Any) -> None:
    """The same command, resumed, ends well, with the same bytes, and leaves nothing else behind."""
    ended = zygote.run([*scene.again(place), *more], **how)
    assert ended.code == 0, ended.stderr
    assert digest(place / "out") == scene.result
    assert sorted(path.name for path in place.iterdir()) == ["out", *scene.beside]


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy()
