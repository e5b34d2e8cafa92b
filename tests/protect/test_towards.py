"""`align --bases`: a model in the basis of a reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from locked_models import answers, moved, saved
from safetensors.torch import load_file, save_file

from weightsmith.align import agree
from weightsmith.align.towards import towards
from weightsmith.cli.main import main
from weightsmith.core.errors import NotKept, OutputError, SourceError
from weightsmith.io.package.manifest import read_manifest
from weightsmith.io.read.open import open_source
from weightsmith.jobs.verify import rerun
from weightsmith.protect.refusals import lock_notes
from weightsmith.protect.run import lock


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a fine-tune of it, and the fine-tune in another basis."""
    home = tmp_path_factory.mktemp("towards")
    saved("llama", home / "base")
    saved("llama", home / "tuned")
    state = load_file(home / "base" / "model.safetensors")
    draw = torch.Generator().manual_seed(3)
    tuned = {n: t + 0.01 * t.std() * torch.randn(t.shape, generator=draw) for n, t in state.items()}
    save_file(tuned, home / "tuned" / "model.safetensors", {"format": "pt"})
    lock(home / "tuned", home / "locked", home / "key", compare=False)
    return home


def test_heads_units_scales_and_rotations_come_back(home: Path, tmp_path: Path) -> None:
    made = towards(home / "locked", home / "base", tmp_path / "out")
    assert made.agreement is not None
    assert made.agreement.holds
    assert made.distance[0] > 1
    assert made.distance[1] < 0.02
    assert made.residual < 0.05
    assert not made.result.warnings
    assert moved(answers(home / "locked"), answers(tmp_path / "out")) < 1e-4
    tuned, back = (load_file(folder / "model.safetensors") for folder in (home / "tuned", tmp_path / "out"))
    assert max(float((tuned[n] - back[n]).norm() / tuned[n].norm()) for n in tuned) < 0.02
    manifest = read_manifest(tmp_path / "out")
    assert manifest["kind"] == "basis"
    assert (
        "copied" not in {n.split(".")[-2]: how for how, names in manifest["made_by"].items() for n in names}["v_proj"]
    )
    assert lock_notes(open_source(tmp_path / "out")) == {}
    with pytest.raises(OutputError, match="made by weightsmith align --bases"):
        rerun(tmp_path / "out")


@pytest.mark.parametrize("name", ["mixtral", "gemma3", "deepseek"])
def test_permuted_and_locked_layouts(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "base")
    lock(tmp_path / "base", tmp_path / "locked", tmp_path / "key", compare=False)
    made = towards(tmp_path / "locked", tmp_path / "base", tmp_path / "out")
    assert made.distance[1] < 1e-5
    assert moved(answers(tmp_path / "locked"), answers(tmp_path / "out")) < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_strangers_keep_their_function_and_are_said(name: str, tmp_path: Path) -> None:
    """Least squares always give something: it may not change what the model computes, nor look like a success.

    Behind a norm with unequal gains no angle of theirs may be taken, however small.
    """
    saved(name, tmp_path / "base")
    saved(name, tmp_path / "stranger", seed=7)
    made = towards(tmp_path / "stranger", tmp_path / "base", tmp_path / "out")
    assert moved(answers(tmp_path / "stranger"), answers(tmp_path / "out")) < 1e-4
    assert "hardly come from one" in str(made.result.warnings[-1])


def test_what_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("gpt2", tmp_path / "gpt2")
    with pytest.raises(SourceError, match="no attention and no MLP in common"):
        towards(tmp_path / "gpt2", home / "base", tmp_path / "out")
    monkeypatch.setattr(agree, "TOLERANCES", {"float32": 1e-12})
    with pytest.raises(NotKept, match="nothing is kept: outputs moved by"):
        towards(home / "locked", home / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["align", str(home / "locked"), "--to", str(home / "base"), "--out", str(tmp_path / "out"), "--bases"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["distance"][1] < 0.02
    assert main(words) == 2
    assert main([*words, "--overwrite"]) == 0
    assert "heads and hidden units stood elsewhere" in capsys.readouterr().out
    assert main([*words, "--keep", "0.5"]) == 2
    assert "leave out --keep" in capsys.readouterr().err
