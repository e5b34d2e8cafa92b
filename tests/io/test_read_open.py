"""`open_source`: every kind of input by its one name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightsmith.core.errors import SourceError
from weightsmith.io.read import open as opening
from weightsmith.io.read.folder import FolderSource
from weightsmith.io.read.open import FORMATS, Format, folder_kind, open_source
from weightsmith.io.read.peft import AdapterSource
from weightsmith.io.read.pickle import PickleSource
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.source import MemorySource
from weightsmith.jobs.compress import compress
from weightsmith.recipe.schema import Recipe


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"m.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_paths(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"m.weight": torch.ones(2, 2)}, model / "x.pt")
    for ref, kind in {
        model: FolderSource,
        model / "model.safetensors": SafetensorsSource,
        model / "x.pt": PickleSource,
    }.items():
        for form in (ref, str(ref)):
            source = open_source(form)
            assert type(source) is kind
            assert source.origin.folder == model
            assert source.read("m.weight").sum() == 4
    monkeypatch.setenv("HOME", str(model.parent))
    assert open_source("~/model").read("m.weight").sum() == 4


def test_tensors_modules_and_sources() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(3, 2)
            self.head = torch.nn.Linear(2, 3, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("count", torch.tensor(5))
            self.register_buffer("scratch", torch.tensor(6), persistent=False)

    source = open_source(Tied())
    assert set(source.keys) == {"embed.weight", "count"}
    assert source.aliases == {"head.weight": "embed.weight"}
    assert source.origin.label == "Tied"
    assert open_source(source) is source
    assert open_source({"w": torch.ones(1)}).read("w").item() == 1


@pytest.mark.parametrize(
    ("ref", "text"),
    [
        (3, "cannot open a int as a model"),
        (None, "cannot open a NoneType as a model"),
        ({"w": 3}, "'w' is a int, not a tensor"),
        ({3: torch.ones(1)}, "3 is a Tensor, not a tensor under a name"),
        ({"w": torch.ones(1, device="meta")}, "'w' is a sparse, quantized or empty-shell"),
        ("", "'' is neither a path nor a hub id"),
        ("a\0b", "neither a path nor a hub id"),
    ],
)
def test_what_cannot_be_opened(ref: Any, text: str) -> None:
    with pytest.raises(SourceError, match=text):
        open_source(ref)


def test_missing_paths_name_their_neighbour(model: Path) -> None:
    with pytest.raises(SourceError, match=r"modle: no such file or folder; did you mean '.*/model'\?"):
        open_source(model.parent / "modle")
    with pytest.raises(SourceError, match=r"no such file or folder; did you mean '.*/model'\?"):
        open_source(str(model.parent / "modell" / "deeper"))
    with pytest.raises(SourceError, match=r"no such file or folder$"):
        open_source(model / "quite different")
    (model / "notes.txt").write_text("")
    with pytest.raises(SourceError, match=r"notes\.txt: unknown kind of file; give a model folder or"):
        open_source(model / "notes.txt")


def test_a_local_folder_named_like_an_organisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        SourceError, match="org/name: no such file or folder; for the model on the hub write hf://org/name"
    ):
        open_source("org/name")


def test_adapters_need_a_base(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    save_file(
        {"m.lora_A.weight": torch.ones(1, 2), "m.lora_B.weight": torch.ones(2, 1)},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(SourceError, match="adapter: a LoRA adapter, which needs a base model; give one under `base`"):
        open_source(adapter)
    source = open_source(adapter, base=open_source(model))
    assert isinstance(source, AdapterSource)
    assert source.read("m.weight").tolist() == [[2, 2], [2, 2]]
    assert source.origin.folder == model


def test_the_kind_of_a_folder(model: Path) -> None:
    (model / "weightsmith.json").write_text(json.dumps({"kind": "codec"}))
    assert folder_kind(model) == "codec"
    with pytest.raises(SourceError, match=r"weightsmith\.json"):
        open_source(model, expert="math")
    (model / "weightsmith.json").write_text(json.dumps({"kind": "merge"}))
    assert isinstance(open_source(model), FolderSource)
    with pytest.raises(SourceError, match="expert 'math' was asked for, but this is one model"):
        open_source(model, expert="math")
    for text in ("[]", "{", '{"kind": 3}'):
        (model / "weightsmith.json").write_text(text)
        assert folder_kind(model) is None


def test_a_fresh_process_reads_compressed_folders(tmp_path: Path) -> None:
    """Nothing else has to be imported first."""
    base, tuned = {"w": torch.zeros(4, 4)}, {"w": torch.ones(4, 4)}
    for name, state in (("base", base), ("a", tuned), ("b", {"w": -tuned["w"]})):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    tree = {"base": str(tmp_path / "base"), "models": {n: str(tmp_path / n) for n in "ab"}, "method": "exact"}
    compress(Recipe.model_validate(tree), tmp_path / "small", accept_loss=True)
    opened = f"ws.open_source({str(tmp_path / 'small')!r}, expert='a')"
    code = f"import weightsmith as ws; print({opened}.read('w').mean().item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1.0\n", "")


def test_formats_are_told_apart_by_one_table(model: Path) -> None:
    """The first entry that accepts a ref opens it; a new one is a line."""
    own = Format("own", lambda ref: ref == model, lambda asked: MemorySource({}, f"mine of {asked.expert}"), True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "FORMATS", (own, *FORMATS))
        assert open_source(str(model), expert="math").origin.label == "mine of math"
    assert isinstance(open_source(model), FolderSource)
