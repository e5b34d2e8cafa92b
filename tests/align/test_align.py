"""`weightsmith align`, the folder it writes, and the view of it in recipes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import saved
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from kit import noise
from weightsmith import Recipe, merge
from weightsmith.align.chosen import NOTHING
from weightsmith.align.layout import layout
from weightsmith.align.match import match, objective
from weightsmith.align.run import Settings, align, matched
from weightsmith.align.spectrum import alignment
from weightsmith.cli.main import main
from weightsmith.core.errors import PlanError, RecipeError, SourceError
from weightsmith.core.symmetry import identity, permute
from weightsmith.io.package.manifest import read_manifest, write_manifest
from weightsmith.io.read.aligned import AlignedSource, read_alignment
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.open import open_source
from weightsmith.io.read.source import MemorySource, Source


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Independent models of two families, and a fine-tune."""
    home = tmp_path_factory.mktemp("models")
    for family in ("llama", "mixtral"):
        for seed in (0, 1):
            saved(family, home / f"{family}{seed}", seed)
    shutil.copytree(home / "llama0", home / "tuned")
    state = load_file(home / "llama0" / "model.safetensors")
    tuned = {name: t + 1e-3 * noise(*t.shape, seed=i) for i, (name, t) in enumerate(state.items())}
    save_file(tuned, home / "tuned" / "model.safetensors", {"format": "pt"})
    for family in ("llama", "mixtral"):
        align(home / f"{family}1", home / f"{family}0", home / f"align-{family}")
    return home


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(2, 40).reshape(2, 19)).logits
    return found


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_aligned_model_is_another_state_of_the_same_function(family: str, models: Path, tmp_path: Path) -> None:
    recipe = {"models": {"b": {"model": str(models / f"{family}1"), "align": str(models / f"align-{family}")}}}
    Recipe(**recipe, method="linear").run(tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (models / f"{family}1", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert sum(torch.equal(before[n], after[n]) for n in before) < len(before) / 3
    assert float((logits(tmp_path / "out") - logits(models / f"{family}1")).abs().max()) < 1e-5


def test_the_midpoint_is_that_of_permuted_tensors(models: Path, tmp_path: Path) -> None:
    a, b = (load_file(models / f"llama{i}" / "model.safetensors") for i in (0, 1))
    found = read_alignment(models / "align-llama")
    placed = dict(b)
    for group in found.groups:
        placed |= permute(placed, group, found.orders)
    aligned = AlignedSource(open_source(models / "llama1"), found)
    got = merge({"a": open_source(models / "llama0"), "b": aligned}, "linear")
    assert all(torch.equal(got[n], (a[n] + placed[n]) / 2) for n in a)
    assert objective(a, placed) > objective(a, b)


@pytest.mark.parametrize("far", [1, 1 << 20])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_rows_come_one_by_one_as_they_do_at_once(
    family: str, far: int, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsmith.io.read.aligned._FAR", far)
    found = read_alignment(models / f"align-{family}")
    source = packed_like_memory(open_source(models / f"{family}1"))
    tensors = {name: source.read(name) for name in source.keys}
    for group in found.groups:
        tensors |= permute(tensors, group, found.orders)
    computed = _Computed({name: source.read(name) for name in source.keys})
    for view in (AlignedSource(source, found), AlignedSource(computed, found)):
        for name, whole in tensors.items():
            assert torch.equal(view.read(name), whole)
            pieces = [view.read(name, low, low + 3) for low in range(0, len(whole), 3)]
            assert torch.equal(torch.cat(pieces), whole)
            assert len(view.read(name, 2, 2)) == 0


class _Computed(MemorySource):
    """Its tensors are calculated on reading."""

    def computes(self, name: str) -> bool:
        return True

    def block(self, name: str, low: int = 0, high: int | None = None, into: Any = None) -> Any:
        return super().block(name, low, high).tensor()


def test_a_fine_tune_is_aligned_already(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["align", str(models / "tuned"), "--to", str(models / "llama0"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "aligned already: every unit stays where it is" in said
    assert "the models come from one: their embeddings have a cosine of 1.000" in said
    free = matched(*_opened(models, "tuned", "llama0"), Settings(freeze=(NOTHING,)))
    assert free.aligned
    assert "residual" not in free.layout.frozen


def test_independent_models_come_nearer(models: Path) -> None:
    found = matched(*_opened(models, "llama1", "llama0"), Settings(spectra=True))
    assert not found.aligned
    assert found.after > found.before
    assert found.distance[1] < found.distance[0]
    before, after = np.mean(list(found.spectrum.values()), axis=0)
    assert after > before + 0.05
    frozen = matched(*_opened(models, "llama1", "llama0"), Settings(freeze=("residual", "mlp")))
    assert {g.kind for g in frozen.layout.groups} == {"kv"}
    assert frozen.layout.frozen["model.layers.0.mlp.hidden"] == "as asked for"
    several = matched(*_opened(models, "llama1", "llama0"), Settings(restarts=4))
    assert several.after >= found.after
    assert matched(*_opened(models, "llama1", "llama0"), Settings(normalize=True)).after < found.after


def test_singular_vectors() -> None:
    a = noise(9, 6)
    assert alignment(a, a) == pytest.approx(1)
    assert alignment(a, 3 * a) == pytest.approx(1)
    assert alignment(a, -a) == pytest.approx(-1)
    assert alignment(a, torch.zeros(9, 6)) == 0
    assert abs(alignment(noise(80, 80), noise(80, 80, seed=1))) < 0.1
    # A permutation moves singular vectors and no singular value; undone, the vectors lie as before.
    moved = a[torch.randperm(9)][:, torch.randperm(6)]
    torch.testing.assert_close(torch.linalg.svdvals(moved), torch.linalg.svdvals(a))
    assert alignment(a, moved) < 0.9


def test_the_verb(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", str(models / "mixtral1"), "--show"]) == 0
    said = capsys.readouterr().out
    assert "model.layers.*.mlp.experts  experts       4  48 hidden" in said
    assert "rotary position embeddings turn pairs of them" in said
    assert main(["align", str(models / "mixtral1"), "--show", "--json"]) == 0
    assert {g["kind"] for g in json.loads(capsys.readouterr().out)["groups"]} == {"residual", "kv", "experts"}
    out = tmp_path / "out"
    assert main(["align", str(models / "llama1"), "--to", str(models / "llama0"), "-o", str(out), "--spectra"]) == 0
    said = capsys.readouterr().out
    assert "alignment of singular vectors" in said
    assert f"wrote {out}" in said
    assert {p.name for p in out.iterdir()} == {"permutations.safetensors", "weightsmith.json"}
    assert sum(p.stat().st_size for p in out.iterdir()) < 20_000
    assert main(["align", str(models / "llama1"), "--to", str(models / "llama0"), "--out", str(out)]) == 2
    assert "out" in capsys.readouterr().err
    assert main(["align", str(models / "llama1")]) == 2
    assert "write: weightsmith align MOVING --to REFERENCE --out FOLDER" in capsys.readouterr().err


def test_models_that_do_not_fit_are_refused(models: Path, tmp_path: Path) -> None:
    llama, mixtral = _opened(models, "llama0", "mixtral0")
    with pytest.raises(SourceError, match=r"do not have the same tensors: model\.layers\.\d\..* is in the \w+"):
        matched(mixtral, llama, Settings())
    shutil.copytree(models / "llama1", tmp_path / "wide")
    state = load_file(tmp_path / "wide" / "model.safetensors")
    state["lm_head.weight"] = torch.zeros(51, 40)
    save_file(state, tmp_path / "wide" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"lm_head\.weight is \[51, 40\] in .*wide and \[50, 40\] in"):
        matched(open_source(tmp_path / "wide"), llama, Settings())
    shutil.copytree(models / "llama1", tmp_path / "heads")
    config = json.loads((models / "llama1" / "config.json").read_text())
    text = json.dumps({**config, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 20})
    (tmp_path / "heads" / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"are not built alike: model\.layers\.0\.self_attn differs, as config\.json"):
        matched(open_source(tmp_path / "heads"), llama, Settings())
    with pytest.raises(RecipeError, match="no group is called 'residul'; did you mean 'residual'"):
        matched(*_opened(models, "llama1", "llama0"), Settings(freeze=("residul",)))
    with pytest.raises(RecipeError, match=r"restarts = 0 is outside \[1, inf\)"):
        Settings(restarts=0)
    with pytest.raises(PlanError):
        align(models / "llama1", models / "llama0", models / "llama0")


def test_an_alignment_is_for_the_model_that_it_was_made_for(models: Path, tmp_path: Path) -> None:
    found = read_alignment(models / "align-llama")
    with pytest.raises(SourceError, match=r"made for another model than .*llama0; align this one anew"):
        AlignedSource(open_source(models / "llama0"), found)
    copy = shutil.copytree(models / "llama1", tmp_path / "copy")  # another time of change, the same bytes
    AlignedSource(open_source(copy), found)
    with pytest.raises(SourceError, match=r"with the tensor lm_head\.weight; .* has none"):
        AlignedSource(MemorySource({"w": torch.ones(2)}), found)
    memory = load_file(models / "llama1" / "model.safetensors")
    memory["lm_head.weight"] = torch.zeros(50, 39)
    with pytest.raises(SourceError, match=r"lm_head\.weight of .* is \[50, 39\], which does not fit"):
        AlignedSource(MemorySource(memory), found)


def test_a_folder_that_lies_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="an alignment is what weightsmith align writes"):
        read_alignment(models / "llama0")
    broken = shutil.copytree(models / "align-llama", tmp_path / "twice")
    orders = load_arrays(broken / "permutations.safetensors")
    orders["residual"][0] = orders["residual"][1]
    save_arrays(orders, broken / "permutations.safetensors")
    with pytest.raises(SourceError, match="the order of residual is no permutation: a unit is twice there or lacking"):
        read_alignment(broken)
    for change, said in (
        ({"kind": "merge"}, "no alignment but a merge"),
        ({"alignment": {"groups": [{"name": "x"}]}}, "the groups in weightsmith.json are not those of this version"),
    ):
        other = shutil.copytree(models / "align-llama", tmp_path / said.replace(" ", "-"))
        write_manifest(other, {**read_manifest(other), **change})
        with pytest.raises(SourceError, match=said):
            read_alignment(other)


def test_an_alignment_is_no_model(models: Path) -> None:
    with pytest.raises(SourceError, match="an alignment, not a model; name it as `align` of the model"):
        open_source(models / "align-llama")


def test_recipes_say_what_is_wrong(models: Path, tmp_path: Path) -> None:
    text = f"models: {{a: {models / 'llama0'}, b: {{model: {models / 'llama1'}, align: {models / 'llama0'}}}}}\n"
    (tmp_path / "recipe.yaml").write_text(text + "method: linear\n")
    with pytest.raises(PlanError, match=r"b: .*llama0.* an alignment is what weightsmith align writes"):
        Recipe.load(tmp_path / "recipe.yaml").run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_orders_of_one_model_may_be_merged(models: Path, tmp_path: Path) -> None:
    b = {"model": str(models / "llama1"), "align": str(models / "align-llama")}
    models_ = {"as it is": str(models / "llama1"), "in order": b}
    Recipe(models=models_, method="linear").run(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_numbers_that_are_none_are_named(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama1", tmp_path / "nan")
    state = load_file(tmp_path / "nan" / "model.safetensors")
    state["model.norm.weight"][3] = torch.nan
    save_file(state, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    code = main(["align", str(tmp_path / "nan"), "--to", str(models / "llama0"), "--out", str(tmp_path / "out")])
    assert code == 2
    assert not (tmp_path / "out").exists()


def _opened(models: Path, *names: str) -> list[Source]:
    return [open_source(models / name) for name in names]


def test_permuted_heads_come_back_through_the_folder(models: Path, tmp_path: Path) -> None:
    """Swapped key-value heads with their query heads: all four projections have cosine 1 with the original's."""
    source = open_source(models / "llama0")
    original = {name: source.read(name) for name in source.keys}
    groups = [group for group in layout(source).groups if group.kind == "kv"]
    tensors = original
    for group in groups:
        swapped = {name: order[..., ::-1].copy() for name, order in identity(group).items()}
        tensors = {**tensors, **permute(tensors, group, swapped)}
    shutil.copytree(models / "llama0", tmp_path / "swapped")
    save_file(tensors, tmp_path / "swapped" / "model.safetensors", {"format": "pt"})
    align(tmp_path / "swapped", models / "llama0", tmp_path / "out")
    back = AlignedSource(open_source(tmp_path / "swapped"), read_alignment(tmp_path / "out"))
    for name in original:
        assert torch.equal(back.read(name), original[name])
    assert not torch.equal(tensors["model.layers.0.self_attn.q_proj.weight"], original[
        "model.layers.0.self_attn.q_proj.weight"])  # fmt: skip
    assert match(groups, original, tensors).before < objective(original, original)
