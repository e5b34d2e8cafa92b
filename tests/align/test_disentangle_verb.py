"""`weightsmith disentangle`: maps of ordinary and linearised models in folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weightsmith.align.disentangled import disentangled
from weightsmith.cli.main import main
from weightsmith.core.errors import SourceError
from weightsmith.observe.data import read_examples
from weightsmith.observe.model import load_model
from weightsmith.train.recipe import loads
from weightsmith.train.run import train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(root / "base")
    for name, word in (("a", "plus"), ("b", "with")):
        (root / f"{name}.txt").write_text("".join(f"{n} {word} {n} is {2 * n}. " for n in range(120)))
        for tune in ("linear", "full"):
            asked = loads(
                f"{{model: {root / 'base'}, data: {root / name}.txt, tune: {tune}, steps: 4, batch: 4, length: 24,"
                " every: 4, optimizer: {adamw: {lr: 0.02}}}"
            )
            loaded = load_model(root / "base", device="cpu")
            train(
                asked,
                loaded,
                read_examples(root / f"{name}.txt", loaded, examples=32, length=24),
                root / f"{tune}-{name}",
            )
    return root


@pytest.mark.parametrize("kind", ["linear", "full"])
def test_the_map_of_two_folders(kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["disentangle", *(str(place / n) for n in ("base", f"{kind}-a", f"{kind}-b"))]
    words += ["--data", str(place / "a.txt"), "--data", str(place / "b.txt"), "--points", "5", "--examples", "6"]
    words += ["--length", "16", "--device", "cpu"]
    assert main([*words, "--html", str(tmp_path / "map.html"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    error = np.array(found["error"])
    assert found["linearized"] == (kind == "linear")
    assert error[2, 2] == 0  # nothing is added
    assert ((error >= 0) & (error <= 2)).all()
    assert error.max() > 0
    # On an axis one model is alone: only the other task's data see something that is not theirs.
    assert error[2].max() <= 1
    assert "Disentanglement error" in (tmp_path / "map.html").read_text()
    assert main(words) == 0
    assert (
        f"disentanglement error of {'linearised' if kind == 'linear' else 'ordinary'} models" in capsys.readouterr().out
    )


def test_models_that_do_not_go_together(place: Path, tmp_path: Path) -> None:
    data = (place / "a.txt", place / "b.txt")

    def run(*names: str, base: str = "base", texts: tuple[Path, ...] = data) -> object:
        return disentangled(
            place / base, [place / n for n in names], texts, points=3, examples=4, length=16, device="cpu"
        )

    with pytest.raises(SourceError, match=r"linear-b is linearised, the other is not; a map is of two of one kind"):
        run("full-a", "linear-b")
    with pytest.raises(SourceError, match="linearised around another model than the base"):
        run("linear-a", "linear-b", base="full-a")
    with pytest.raises(SourceError, match=r"a map is of two models with data each, not of 2 with 1"):
        run("full-a", "full-b", texts=data[:1])
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n{"text": "twenty-two"}\n')
    with pytest.raises(SourceError, match=r"texts of unlike length; give a \.txt, which is cut into equal ones"):
        run("full-a", "full-b", texts=(tmp_path / "t.jsonl", data[1]))
