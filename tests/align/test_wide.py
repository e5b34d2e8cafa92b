"""Partial merges of whole models: wider MLPs that transformers loads, from two views and a plain average."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import saved
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from weightsmith import Recipe
from weightsmith.align.data import Pair
from weightsmith.align.layout import layout
from weightsmith.align.partial import expanded, flops
from weightsmith.align.proof import drawn
from weightsmith.align.run import Settings, _fit, align, matched
from weightsmith.cli.main import main
from weightsmith.core.errors import PlanError, RecipeError, SourceError
from weightsmith.core.symmetry import permute
from weightsmith.io.package.manifest import verify_folder
from weightsmith.io.read.aligned import aligned, read_alignment
from weightsmith.io.read.open import open_source
from weightsmith.io.read.widened import widened_config
from weightsmith.observe.data import read_examples
from weightsmith.observe.model import load_model

TOKENS = torch.arange(2, 32).reshape(2, 15)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2", "phi3"):
        for seed in (0, 1):
            saved(family, home / f"{family}{seed}", seed)
    return home


def merged(models: Path, family: str, folder: Path, **settings: float) -> Path:
    first, second = models / f"{family}0", models / f"{family}1"
    align(second, first, folder / "aligned", Settings(**settings))  # type: ignore[arg-type]
    both = {
        name: {"model": str(path), "align": str(folder / "aligned")} for name, path in (("a", first), ("b", second))
    }
    Recipe.model_validate({"models": both, "method": "linear"}).run(folder / "wide")
    return folder / "wide"


def logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]  # noqa: PT018
    with torch.no_grad():
        found: torch.Tensor = model.eval()(tokens).logits
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_transformers_loads_the_wider_model(family: str, keep: float, models: Path, tmp_path: Path) -> None:
    wide = merged(models, family, tmp_path, keep=keep)
    half = read_alignment(tmp_path / "aligned").halves[0]
    assert half.separate.shape[1] == (half.group.size if keep == 1 else -(-3 * (half.group.size - 1) // 10))
    config = json.loads((wide / "config.json").read_text())
    assert config.get("intermediate_size", config.get("n_inner")) == half.width
    assert bool(torch.isfinite(logits(wide)).all())


def test_the_weights_are_the_blocks_of_the_paper(models: Path, tmp_path: Path) -> None:
    wide = load_file(merged(models, "llama", tmp_path, keep=0.5) / "model.safetensors")
    found = read_alignment(tmp_path / "aligned")
    a, b = (load_file(models / f"llama{i}" / "model.safetensors") for i in (0, 1))
    from weightsmith.align.partial import Split
    from weightsmith.core.symmetry import permute

    for group in found.groups:
        b |= permute(b, group, found.orders)
    for half in found.halves:
        cut = Split(half.merged, half.separate)
        *writes, reads = (axis.name for axis in half.group.axes)
        for name in writes:
            assert torch.allclose(wide[name], expanded(a[name], b[name], cut), atol=1e-6)
        assert torch.allclose(wide[reads], expanded(a[reads], b[reads], None, cut), atol=1e-6)


def test_equal_models_stay_what_they_are_at_every_width(models: Path, tmp_path: Path) -> None:
    """The moving model has its hidden units shuffled: another file, the same function."""
    state = load_file(models / "llama0" / "model.safetensors")
    for i in range(2):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(i))
        name = f"model.layers.{i}.mlp"
        state |= {n: state[n][order] for n in (f"{name}.gate_proj.weight", f"{name}.up_proj.weight")}
        state[f"{name}.down_proj.weight"] = state[f"{name}.down_proj.weight"][:, order].contiguous()
    home = tmp_path / "home"
    shutil.copytree(models / "llama0", home / "llama0")
    shutil.copytree(models / "llama0", home / "llama1")
    save_file(state, home / "llama1" / "model.safetensors", {"format": "pt"})
    wide = merged(home, "llama", tmp_path, keep=0.4)
    assert float((logits(wide) - logits(models / "llama0")).abs().max()) < 1e-4


def test_a_budget_is_kept(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["align", str(models / "llama1"), "--to", str(models / "llama0"), "--out", str(tmp_path / "out")]
    assert main([*words, "--budget", "1.2"]) == 0
    said = capsys.readouterr().out
    assert "hidden units of every MLP:" in said
    assert "with the method linear" in said
    (half, _) = read_alignment(tmp_path / "out").halves
    share = half.separate.shape[1] / half.group.size
    inside = 2 * (40 * 40 + 2 * 20 * 40 + 40 * 40), 2 * 3 * 48 * 40, 50 * 40  # attentions, MLPs, head
    grown = flops([(inside[0] + inside[2], None, None), (inside[1], None, share)])
    assert 1.2 - 0.03 < grown <= 1.2


def test_wider_models_read_block_by_block(models: Path, tmp_path: Path) -> None:
    align(models / "gpt21", models / "gpt20", tmp_path / "aligned", Settings(keep=0.5))
    found = read_alignment(tmp_path / "aligned")
    for name in ("gpt20", "gpt21"):
        view = aligned(open_source(models / name), found)
        for key in view.keys.values():
            whole = view.read(key.name)
            assert tuple(whole.shape) == key.shape
            assert torch.equal(torch.cat([view.read(key.name, i, i + 5) for i in range(0, key.rows, 5)]), whole)


def test_what_cannot_become_wider(models: Path, tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "mixtral")
    with pytest.raises(SourceError, match=r"its MLPs cannot become wider together: .*experts has experts"):
        align(tmp_path / "mixtral", tmp_path / "mixtral", tmp_path / "out", Settings(keep=0.5))
    with pytest.raises(SourceError, match=r"config\.json has no field that says 48 hidden units, so none can say 60"):
        widened_config('{"hidden_size": 40}', {(48, 60)}, "model")
    with pytest.raises(SourceError, match="its MLPs are not all of one width"):
        widened_config('{"d_ff": 48}', {(48, 60), (50, 60)}, "model")
    with pytest.raises(RecipeError, match="give a share to keep or a budget, not both"):
        Settings(keep=0.5, budget=1.2)
    with pytest.raises(RecipeError, match=r"keep = 2 is outside \[0, 1\]"):
        Settings(keep=2)
    align(models / "llama1", models / "llama0", tmp_path / "aligned", Settings(keep=0.5))
    other = {"a": {"model": str(models / "phi30"), "align": str(tmp_path / "aligned")}}
    with pytest.raises(PlanError, match="made for two other models than"):
        Recipe.model_validate({"models": other, "method": "linear"}).run(tmp_path / "merged")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_least_squares_fit_what_both_models_do(family: str, models: Path) -> None:
    """No layer is worse than the mean on the data, and where everything stays separate both are there as they were."""
    pair = [load_model(models / f"{family}{i}", device="cpu") for i in (0, 1)]
    draw = torch.Generator().manual_seed(0)
    data = read_examples([torch.randint(2, 50, (14,), generator=draw) for _ in range(40)], pair[0])
    sources = [open_source(models / f"{family}{i}") for i in (0, 1)]
    for keep in (0.0, 0.4):
        found = matched(sources[1], sources[0], Settings(keep=keep))
        fit = _fit(Pair(pair[0], pair[1], data), sources[1], sources[0], found.layout, found.orders, found.splits)
        assert len(fit.losses) == len([n for n in fit.tensors if n.endswith("weight")]) > 0
        assert all(after <= before * (1 + 1e-9) for before, after in fit.losses.values())
        assert np.mean([after / before for before, after in fit.losses.values()]) < 0.9
    up = next(name for name in fit.tensors if "down" in name or name.endswith("mlp.c_proj.weight"))
    half = next(iter(found.splits.values()))
    assert half.width in fit.tensors[up].shape


def test_a_permuted_copy_is_fitted_to_the_model_itself(tmp_path: Path) -> None:
    """B is A in another order: least squares at ratio 0 give A, through the folder, the views and transformers."""
    saved_with_bytes(tmp_path / "a")
    source = open_source(tmp_path / "a")
    tensors = {name: source.read(name) for name in source.keys}
    for group in layout(source).groups:
        tensors |= permute(tensors, group, drawn(group, np.random.default_rng(0)))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    letters = np.random.default_rng(0).integers(33, 123, 6000)
    (tmp_path / "t.txt").write_text("".join(map(chr, letters)))
    settings = Settings(keep=0.0, data=str(tmp_path / "t.txt"), examples=100, length=32, freeze=("nothing",))
    align(tmp_path / "b", tmp_path / "a", tmp_path / "aligned", settings)
    assert verify_folder(tmp_path / "aligned") == []
    both = {n: {"model": str(tmp_path / n), "align": str(tmp_path / "aligned")} for n in "ab"}
    Recipe.model_validate({"models": both, "method": "linear"}).run(tmp_path / "wide")
    wide = open_source(tmp_path / "wide")
    stored = open_source(tmp_path / "aligned" / "permutations.safetensors")
    fitted = [name for name in stored.keys if name.startswith("fitted/")]
    assert len(fitted) == 14
    for name in fitted:
        assert torch.equal(wide.read(name.removeprefix("fitted/")), stored.read(name))
    tokens = torch.from_numpy(letters[:64].reshape(2, 32))
    torch.testing.assert_close(logits(tmp_path / "wide", tokens), logits(tmp_path / "a", tokens), rtol=0, atol=1e-3)
    assert any(not torch.equal(wide.read(n), source.read(n)) for n in source.keys)


def saved_with_bytes(folder: Path) -> None:
    """A Llama whose tokens are bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=2, **sizes)).save_pretrained(folder)
