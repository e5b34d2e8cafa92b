"""Recipes of adapters, the command line, and what is refused, in one line each."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from weightsmith import lora
from weightsmith.cli.main import main
from weightsmith.core.errors import OutputError, PlanError, RecipeError, WeightsmithError
from weightsmith.io import system
from weightsmith.io.read.lora_files import read_adapter
from weightsmith.io.write import output
from weightsmith.lora.recipe import loads, method_of
from weightsmith.lora.rules import Averaged, Combine, SharedBasis

Shapes = dict[str, tuple[int, int]]
SHAPES: Shapes = {"layers.0.q": (8, 6), "layers.1.q": (8, 6)}
PREFIX = "base_model.model."


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(folder: Path, seed: int, rank: int = 2, shapes: Shapes = SHAPES, **config: Any) -> Path:
    folder.mkdir()
    tensors = {}
    for i, (module, (outputs, inputs)) in enumerate(shapes.items()):
        tensors[f"{PREFIX}{module}.lora_A.weight"] = noise(rank, inputs, seed=seed + i)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = noise(outputs, rank, seed=seed + i + 50)
        if config.get("use_dora"):
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = torch.ones(outputs)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Path]:
    return {"a": make(tmp_path / "a", 1), "b": make(tmp_path / "b", 100)}


RECIPE = """models:
  a: {model: a, weight: 0.5}
  b: b
method: %s
"""


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (RECIPE % "cat", Combine("cat", weight=(0.5, 1.0))),
        (RECIPE % "{ties_svd: {density: 0.4, rank: 3}}", Combine("ties_svd", (0.5, 1.0), 0.4, rank=3)),
        (RECIPE % "ties\nparameters: {density: 0.4, vote: frequency, weight: [2, 3]}",
         Combine("ties", (0.5, 3.0), 0.4, "frequency")),
        ("models: {a: a, b: b}\nmethod: svd\nparameters: {weight: {b: -1}}", Combine("svd", (1.0, -1.0))),
        ("models: {a: a, b: b}\nmethod: knots\nparameters: {scaling: 0.5, rank: 4}", SharedBasis(scaling=0.5, rank=4)),
        ("models: {a: a, b: {model: b, value: 2.5}}\nmethod: mwa", Averaged(value=("log", 2.5))),
        ("models: {a: a}\nmethod: average", Averaged(penalty=0.0)),
    ],
)  # fmt: skip
def test_recipes_give_methods(text: str, want: Any) -> None:
    assert method_of(loads(text)) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE % "tise", "r.yaml:4:1: unknown method 'tise' for adapters; did you mean 'ties'?"),
        (
            RECIPE % "task_arithmetic",
            'r.yaml:4:1: task_arithmetic merges models, not adapters; run it with "weightsmith merge"',
        ),
        (RECIPE % "ties", "ties needs a density: the share of the entries that it keeps, in [0, 1]"),
        (RECIPE % "cat\nparameters: {density: 0.5}", "cat takes no density; it is for ties, ties_svd, dare_linear"),
        (RECIPE % "ties\nparameters: {density: 0.5, rank: 4}", "ties takes no rank; it is for svd, ties_svd"),
        (RECIPE % "linear\nparameters: {vote: weighted}", "linear takes no vote; it is for ties"),
        (RECIPE % "svd\nparameters: {rnk: 4}", "unknown key 'rnk' in parameters; did you mean 'rank'?"),
        (RECIPE % "svd\nparameters: {rank: 0}", "svd: rank = 0 is outside [1, inf) | auto"),
        (RECIPE % "ties\nparameters: {density: 40}", "ties: density = 40 is outside [0, 1] | none; write 40% as 0.4"),
        (RECIPE % "svd\nparameters: {weight: [1, 2, 3]}", "r.yaml:5:14: svd: weight has 3 values for 2 models"),
        (RECIPE % "svd\nparameters: {weight: {c: 1}}", "unknown model 'c' in parameters.weight; known: a, b"),
        (
            "models: {a: {model: a, density: 0.1}}\nmethod: ties",
            "ties takes one density for all models; move it from models.a to parameters",
        ),
        (
            "models: {a: {model: a, wieght: 1}}\nmethod: ties",
            "unknown key 'wieght' in models.a; did you mean 'weight'?",
        ),
        (
            "models: {a: {model: base, adapter: a}}\nmethod: svd",
            "r.yaml:1:27: a model with an adapter is one for weightsmith merge, which merges whole models; here write "
            "the adapter's folder alone, a: FOLDER, and the model that all of them stand on once, base: MODEL",
        ),
        ("models: {a: a}\nmethod: svd\nrules: []", "r.yaml:3:1: unknown key 'rules' in the recipe"),
        ("models: {a: a}\nmethod: svd\noutput: {dtyp: x}", "unknown key 'dtyp' in output; did you mean 'dtype'?"),
        ("models: {a: a}\nmethod: svd\noutput: {dtype: float8_e5m2}", "unknown dtype 'float8_e5m2'"),
        ("models: {a: a}", "the recipe has no 'method'"),
        ("models: {a: {weight: 1}}\nmethod: svd", "models.a has no 'model'"),
        ("[1, 2]", "the recipe should be a mapping, is a list"),
    ],
)
def test_recipes_that_say_nothing_sensible(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        loads(text, "r.yaml")
    assert "\n" not in str(caught.value)


def test_the_command_line_end_to_end(
    two: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE % "svd")
    monkeypatch.chdir("/")  # paths are relative to the recipe
    out = tmp_path / "out"
    assert main(["lora", "merge", str(tmp_path / "r.yaml"), str(out), "--set", "parameters.rank=3"]) == 0
    shown = capsys.readouterr()
    assert f"wrote {out}: 2 modules of rank up to 3" in shown.out
    assert "energy kept" in shown.out
    assert main(["verify", str(out)]) == 0
    assert main(["lora", "resize", str(out), str(tmp_path / "small"), "--rank", "1", "--json"]) == 0
    printed = capsys.readouterr().out
    said = json.loads(printed[printed.index("{") :])
    assert [m["rank"] for m in said["modules"]] == [1, 1]
    assert main(["lora", "merge", str(tmp_path / "r.yaml"), str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["lora", "merge", str(tmp_path / "r.yaml"), str(out), "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["verify", str(out), "--rerun"]) == 2
    assert "was made by weightsmith lora" in capsys.readouterr().err


def test_extract_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("base", 0), ("tuned", 1)):
        (tmp_path / name).mkdir()
        save_file({"m.q.weight": noise(8, 6, seed=seed)}, tmp_path / name / "model.safetensors")
    words = ["lora", "extract", str(tmp_path / "tuned"), str(tmp_path / "out"), "--base", str(tmp_path / "base")]
    assert main([*words, "--energy", "0.9"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert main([*words, "--energy", "90", "--overwrite"]) == 2
    assert capsys.readouterr().err == "error: energy = 90 is outside (0, 1]; write 90% as 0.9\n"


def test_the_manifest_holds_what_each_module_lost(two: dict[str, Path], tmp_path: Path) -> None:
    result = lora.merge(two, "svd", tmp_path / "out", rank=2)
    manifest = json.loads((tmp_path / "out/weightsmith.json").read_text())
    assert manifest["kind"] == "adapter"
    for report in result.modules:
        assert manifest["modules"][report.name]["error"] == report.error > 0.1
        assert report.error == pytest.approx((1 - report.energy) ** 0.5, rel=1e-4)
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: peft" in card
    assert "weightsmith lora merge recipe.yaml OUT" in card


def refusals(folder: Path) -> list[tuple[Path, str, dict[str, Any], str]]:
    """(second adapter, method, parameters, message)."""
    density = {"density": 0.5}
    nan = make(folder / "nan", 3)
    broken = load_file(nan / "adapter_model.safetensors")
    broken[f"{PREFIX}layers.0.q.lora_A.weight"][0, 0] = float("nan")
    save_file(broken, nan / "adapter_model.safetensors")
    half = make(folder / "half", 4)
    save_file({n: t for n, t in broken.items() if "1.q.lora_B" not in n}, half / "adapter_model.safetensors")
    return [
        (make(folder / "wide", 5, rank=3), "linear", {}, "layers.0.q: rank 2 in a and 3 in x; linear adds the factors "
         "up and needs equal ranks: use cat or svd"),
        (folder / "wide", "ties", density, "needs equal ranks: use cat or svd"),
        (make(folder / "shape", 6, shapes={"layers.0.q": (6, 8)}), "cat", {}, "these are not for one base"),
        (make(folder / "other", 7, base_model_name_or_path="org/other"), "cat", {}, "a is for the base 'org/base', x "
         "for 'org/other'; if these are the same model, pass --force (force=True)"),
        (make(folder / "turned", 8, fan_in_fan_out=True), "cat", {}, "fan_in_fan_out differs"),
        (make(folder / "dora", 9, use_dora=True), "cat", {}, "use_dora is not a product of two factors"),
        (make(folder / "lokr", 9, peft_type="OFT"), "cat", {}, "peft_type 'OFT' is not supported, only LORA"),
        (make(folder / "pissa", 9, init_lora_weights="pissa"), "cat", {}, "changed the base's weights in training"),
        (make(folder / "rank", 9, rank_pattern={"layers.0.q": 7}), "cat", {}, "has rank 2 in its tensors, but"),
        (nan, "svd", {}, "'layers.0.q' holds NaN or Inf; this adapter is damaged"),
        (half, "svd", {}, "'layers.1.q' lacks a lora_B"),
        (folder, "svd", {}, "no LoRA adapter here (no adapter_config.json, and no LoRA file)"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(12))
def test_what_does_not_go_together(tmp_path: Path, number: int) -> None:
    (tmp_path / "in").mkdir()
    path, method, given, message = refusals(tmp_path / "in")[number]
    first = make(tmp_path / "a", 1, base_model_name_or_path="org/base")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(WeightsmithError, match=re.escape(message)) as caught:
        lora.merge({"a": first, "x": path}, method, tmp_path / "out", **given)
    assert "\n" not in str(caught.value).removeprefix("2 problems:\n  - ").partition("\n")[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_force_combines_adapters_of_other_names(tmp_path: Path) -> None:
    a = make(tmp_path / "a", 1, base_model_name_or_path="org/base")
    b = make(tmp_path / "b", 2, base_model_name_or_path="mirror/base")
    lora.merge({"a": a, "b": b}, "cat", tmp_path / "out", force=True)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_adapters_that_cancel_leave_a_zero(two: dict[str, Path], tmp_path: Path) -> None:
    copy = make(tmp_path / "copy", 1)
    lora.merge({"a": two["a"], "copy": copy}, "svd", tmp_path / "out", weight=(1.0, -1.0))
    found = read_adapter(tmp_path / "out")
    assert {m.rank for m in found.modules.values()} == {1}
    assert not any(bool(found.factors(m)[0].product.any()) for m in found.modules)


def test_convolutions_combine(tmp_path: Path) -> None:
    paths = {}
    for name, seed, rank in (("a", 1, 2), ("b", 2, 3)):
        path = paths[name] = make(tmp_path / name, seed, rank)
        tensors = {
            f"{PREFIX}conv.lora_A.weight": noise(rank, 4, 3, 3, seed=seed),
            f"{PREFIX}conv.lora_B.weight": noise(5, rank, 1, 1, seed=seed + 9),
        }
        save_file(tensors, path / "adapter_model.safetensors")
    full = []
    for path in paths.values():
        t = load_file(path / "adapter_model.safetensors")
        full.append(torch.einsum("or,ri->oi", t[f"{PREFIX}conv.lora_B.weight"][..., 0, 0],
                                 t[f"{PREFIX}conv.lora_A.weight"].flatten(1)))  # fmt: skip
    lora.merge(paths, "svd", tmp_path / "out", weight=(0.5, 2.0), rank=9)
    made = load_file(tmp_path / "out/adapter_model.safetensors")
    a, b = made[f"{PREFIX}conv.lora_A.weight"], made[f"{PREFIX}conv.lora_B.weight"]
    assert (a.shape, b.shape) == ((5, 4, 3, 3), (5, 5, 1, 1))
    assert torch.allclose(b.flatten(1) @ a.flatten(1), 0.5 * full[0] + 2 * full[1], atol=1e-5)


def test_nothing_stays_behind_when_the_disk_fails(
    two: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    real = system.call

    def full(function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if function is os.pwrite:
            raise OSError(28, "No space left on device")
        return real(function, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(system, "call", full)
        with pytest.raises(OutputError, match="No space left on device; free some space"):
            lora.merge(two, "cat", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lora.merge(two, "cat", tmp_path / "out")
    assert sorted({p.name for p in tmp_path.iterdir()} - set(before)) == ["out"]


def test_a_run_cut_short_is_done_anew(two: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output.FolderSink, "_complete", stopped)
        patch.setattr(output, "_discard", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            lora.merge(two, "cat", tmp_path / "out")
    assert (tmp_path / "out.partial/files").exists()
    lora.merge(two, "cat", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(PlanError, match="is also an input"):
        lora.merge(two, "cat", two["a"], overwrite=True)
