"""Small models, and waiting for something."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weightsmith.cli.main import main
from weightsmith.studio.jobs import Job

__all__ = ["EVIL", "HOME", "PORT", "TOKEN", "answered", "small_folder", "until", "write_model"]

TOKEN, PORT = "the-token", 8323
HOME = f"http://127.0.0.1:{PORT}"
EVIL = '<img src=x onerror="alert(1)">'


def write_model(folder: Path, seed: int, layers: int = 3, size: int = 16, evil: bool = False) -> Path:
    """A model of a few blocks; with `evil` its names are markup."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("self_attn.q_proj", "mlp.up_proj")]
    tensors = {name: torch.randn(size, size, generator=generator) for name in [*names, *([EVIL] if evil else [])]}
    save_file(tensors, folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def small_folder(home: Path) -> Path:
    """A folder with three models and a recipe."""
    for seed, name in enumerate(("base", "math", "code")):
        write_model(home / "models" / name, seed)
    (home / "blend.yaml").write_text(
        "# kept\nbase: models/base\nmodels:\n  math: models/math\n  code: models/code\nmethod: ties\n"
    )
    return home


def answered(job: Job, text: str | None = None) -> None:
    """Run the command of a job here, in the working directory, or let it have answered a text."""
    code, out = 0, io.StringIO(text)
    if text is None:
        with redirect_stdout(out):
            code = main(list(job.words))
    (job.folder / "out").write_text(out.getvalue())
    (job.folder / "done").write_text(json.dumps({"code": code, "ended": 0}))


def until(wanted: Callable[[], Any], seconds: float = 600) -> Any:
    """What a question answers as soon as that is true of anything."""
    end = time.monotonic() + seconds
    while not (found := wanted()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)
    return found
