"""The tree of recipes behind a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightsmith.cli.main import main
from weightsmith.core.errors import OutputError
from weightsmith.inspect.ancestry import ancestry, tree_lines
from weightsmith.jobs.compress import compress, restore
from weightsmith.jobs.merge import run
from weightsmith.recipe.load import load
from weightsmith.recipe.schema import Recipe


def make(folder: Path, value: float) -> None:
    folder.mkdir()
    save_file({"layers.0.up_proj.weight": torch.full((4, 2), value)}, folder / "model.safetensors")


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """base, a, b; `first` merges them, `second` merges `first` with a nested recipe."""
    for value, name in enumerate(("base", "a", "b", "c")):
        make(tmp_path / name, float(value))
    (tmp_path / "first.yaml").write_text("base: base\nmodels: {a: a, b: b}\nmethod: ties\nparameters: {density: 0.5}\n")
    run(load(tmp_path / "first.yaml"), tmp_path / "first")
    (tmp_path / "second.yaml").write_text(
        "base: base\nmodels:\n  first: first\n  inner: {model: {models: {b: b, c: c}, method: linear}}\n"
        "method: task_arithmetic\n"
    )
    run(load(tmp_path / "second.yaml"), tmp_path / "second")
    return tmp_path


def test_manifests_and_nested_recipes_are_followed(family: Path) -> None:
    found = ancestry(family / "second")
    assert (found.kind, found.how) == ("merge", "task_arithmetic")
    base, first, inner = found.parts
    assert (base.kind, base.parts, base.notes) == ("model", (), ())
    assert (first.kind, first.how) == ("merge", "ties(density=0.5)")
    assert [p.name for p in first.parts] == ["base", "a", "b"]
    assert first.parts[1].model == str(family / "a")
    assert (inner.kind, inner.how, [p.name for p in inner.parts]) == ("recipe", "linear", ["b", "c"])
    assert not any(p.notes for p in (*first.parts, *inner.parts))


def test_what_is_gone_is_known_from_the_manifest_above(family: Path) -> None:
    (family / "third.yaml").write_text("base: base\nmodels: {second: second, c: c}\nmethod: task_arithmetic\n")
    run(load(family / "third.yaml"), family / "third")
    whole = tree_lines(ancestry(family / "third"))
    for name in ("second", "first"):
        shutil.rmtree(family / name)
    found = ancestry(family / "third")
    second = found.parts[1]
    assert (second.kind, second.how, second.notes) == ("merge", "task_arithmetic", ("no longer there",))
    first = second.parts[1]
    assert (first.kind, first.how, first.notes) == ("merge", "ties(density=0.5)", ("no longer there",))
    assert [part.name for part in first.parts] == ["base", "a", "b"]
    assert [line.replace("; no longer there", "") for line in tree_lines(found)] == whole


def test_a_compressed_folder_that_is_gone(family: Path) -> None:
    models = {name: {"model": str(family / name)} for name in ("a", "b")}
    given = {"base": str(family / "first"), "models": models, "method": "exact"}
    compress(Recipe.model_validate(given), family / "c1", accept_loss=True)
    made = restore(family / "c1", "a", family / "again").out
    shutil.rmtree(family / "c1")
    shutil.rmtree(family / "first")
    (restored,) = ancestry(Path(str(made))).parts
    assert (restored.kind, restored.how, restored.notes) == ("codec", "exact", ("no longer there",))
    base, *others = restored.parts
    assert (base.kind, base.how) == ("merge", "ties(density=0.5)")
    assert [part.name for part in others] == ["a", "b"]


def test_what_changed_or_went_is_told(family: Path) -> None:
    make_again = family / "a/model.safetensors"
    save_file({"layers.0.up_proj.weight": torch.ones(4, 2), "more": torch.ones(1)}, make_again)
    shutil.rmtree(family / "b")
    first = ancestry(family / "second").parts[1]
    assert first.parts[1].notes == ("changed since",)
    assert first.parts[2].notes == ("no longer there",)
    manifest = family / "first/weightsmith.json"
    manifest.write_text(manifest.read_text().replace("ties", "tips"))
    damaged = ancestry(family / "second").parts[1]
    assert "damaged or was edited" in damaged.notes[0]
    with pytest.raises(OutputError, match="was this folder made by weightsmith"):
        ancestry(family / "base")


def test_models_put_together_of_several(family: Path) -> None:
    from weightsmith.inspect.ancestry import _part

    slices = {"model": {"slices": [{"model": str(family / "a"), "layers": [0, 1]}, {"model": str(family / "first")}]}}
    (node,) = _part("stack", slices, None, (), None, lambda path: True)
    assert (node.kind, node.how, [p.name for p in node.parts]) == ("recipe", "slices", ["slice 0", "slice 1"])
    assert node.parts[1].how == "ties(density=0.5)"
    modules = {"modules": {"eyes": {"match": ["v*"], "model": {"model": str(family / "b")}}}}
    (node,) = _part("both", modules, None, (), None, lambda path: True)
    assert [(p.name, p.model) for p in node.parts] == [("eyes", str(family / "b"))]


def test_what_may_not_be_looked_at_counts_as_elsewhere(family: Path) -> None:
    (family / "first/weightsmith.json").write_text("damaged")
    first = ancestry(family / "second", lambda path: path != family / "first").parts[1]
    assert first.notes == ("elsewhere; not looked at",)
    assert first.how == "ties(density=0.5)"  # as the manifest of `second` has it


def test_a_loop_ends(family: Path) -> None:
    shutil.rmtree(family / "a")
    shutil.copytree(family / "second", family / "a")  # what `first` was made from is now made from `first`
    lines = tree_lines(ancestry(family / "second"))
    assert any("stands above already" in line for line in lines)


def test_the_verb_draws_a_tree(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lineage", str(family / "second")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{family / 'second'} (merge: task_arithmetic; weightsmith ")
    assert lines[1] == f"├─ base: {family / 'base'}"
    assert lines[2].startswith(f"├─ first: {family / 'first'} (merge: ties(density=0.5); weightsmith ")
    assert lines[3] == f"│  ├─ base: {family / 'base'}"
    assert lines[6] == "└─ inner: (nested recipe: linear)"
    assert lines[7] == f"   ├─ b: {family / 'b'}"
    assert main(["lineage", str(family / "second"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [p["name"] for p in told["parts"]] == ["base", "first", "inner"]
    assert main(["lineage", str(family / "base")]) == 2
    capsys.readouterr()
    for name in ("t=0.1", "t=0.2"):
        shutil.copytree(family / "first", family / "sweep" / name)
    assert main(["lineage", str(family / "sweep")]) == 0
    drawn = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in drawn if "merge: ties" in line] == [
        str(family / "sweep" / name) for name in ("t=0.1", "t=0.2")
    ]
    assert main(["lineage", str(family / "sweep"), "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)) == ["t=0.1", "t=0.2"]


def test_what_has_no_method_has_no_brackets_for_it(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"models": {"model": {"model": str(family / "a")}}, "lock": {"key": "1f"}}
    manifest = {"kind": "lock", "recipe": recipe, "inputs": {}, "weightsmith": "1"}
    monkeypatch.setattr("weightsmith.inspect.ancestry.read_manifest", lambda folder: manifest)
    assert tree_lines(ancestry(family / "first"))[0] == f"{family / 'first'} (lock; weightsmith 1)"
