"""A folder with small models, and a client that holds the token."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save_file

from weightsmith.studio.app import build

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


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's key lies elsewhere."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    for seed, name in enumerate(("base", "math", "code")):
        write_model(home / "models" / name, seed)
    (home / "blend.yaml").write_text(
        "# kept\nbase: models/base\nmodels:\n  math: models/math\n  code: models/code\nmethod: ties\n"
    )
    return home


@pytest.fixture
def client(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the studio sets for its process
    with TestClient(build((folder,), TOKEN, PORT), base_url=HOME, follow_redirects=False) as made:
        assert made.get("/", params={"token": TOKEN}).status_code == 303
        made.headers["origin"] = HOME
        yield made


def until(wanted: Callable[[], Any], seconds: float = 600) -> Any:
    """What a question answers as soon as that is true of anything."""
    end = time.monotonic() + seconds
    while not (found := wanted()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)
    return found
