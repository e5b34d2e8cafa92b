"""LoRA files of diffusers, kohya and LyCORIS: what those libraries make of a model (recorded), and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import weightsmith as ws
from weightsmith import lora
from weightsmith.core.errors import PlanError, SourceError
from weightsmith.io.read.lora_files import lora_kind, read_adapter
from weightsmith.io.read.open import open_source

FILES = Path(__file__).parent / "lora_files"
CASES = sorted(path.name.removesuffix("-model.safetensors") for path in FILES.glob("*-model.safetensors"))
RULES = {
    "diffusers-adapter": "scales are those of lora_adapter_metadata in its header",
    "diffusers-weights": "no alpha in it or in its header: scale 1, as diffusers takes it",
    "diffusers-noted": "scales are those of lora_adapter_metadata in its header",
    "kohya": "scales are its alpha / rank",
    "kohya-no-alpha": "no alpha in it: scale 1",
    "kohya-some-alphas": "3 modules have no alpha (lora_unet_down_blocks_0_resnets_0_conv1): the most common one "
    "of the file counts there, as in diffusers' loader for Stable Diffusion",
    "diffusers-flux-alphas": "1 modules have no alpha (transformer.transformer_blocks.0.attn.to_out.0): the first "
    "one of the file, 1, counts there, as in diffusers' Flux loader",
    "kohya-flux": "2 modules have no alpha (lora_unet_double_blocks_0_img_mod_lin): scale 1 there, as in "
    "diffusers' Flux loader",
}


def model(case: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(base, what the library makes of it)."""
    found = load_file(FILES / f"{case}-model.safetensors")
    base = {name.removeprefix("base."): t for name, t in found.items() if name.startswith("base.")}
    return base, {name.removeprefix("want."): t for name, t in found.items() if name.startswith("want.")}


@pytest.mark.parametrize("case", CASES)
def test_the_same_weights_as_in_the_library(case: str) -> None:
    base, want = model(case)
    shown = open_source(FILES / f"{case}.safetensors", base=open_source(base))
    assert set(shown.changed) == set(want)
    for name, tensor in base.items():
        got = shown.read(name)
        torch.testing.assert_close(got, want.get(name, tensor), rtol=2e-6, atol=2e-6)
        assert name not in want or float((got - tensor).abs().max()) > 1e-3
        assert torch.equal(torch.cat([shown.read(name, row, row + 1) for row in range(len(got))]), got)
    if case in RULES:
        assert shown.origin.remarks[0] == RULES[case]


@pytest.mark.parametrize("case", [case for case in CASES if "dora" not in case and case != "lycoris-full"])
def test_two_as_one(case: str, tmp_path: Path) -> None:
    """cat of a file with itself at weights 1 and 0.5, in the same names, is 1.5 times the change."""
    base, want = model(case)
    file = FILES / f"{case}.safetensors"
    if case in ("lycoris-loha", "lycoris-lokr", "lycoris-lokr-both"):
        with pytest.raises(
            PlanError, match="lycoris_conv is a convolution, whose kernel a flattened LoHa or LoKr does not"
        ):
            lora.merge({"a": file, "b": file}, "cat", tmp_path / "out", weight=(1.0, 0.5))
        return
    if case == "xlabs-flux":
        with pytest.raises(SourceError, match="lora_unet_single_blocks_0_qkv is a part of a layer by XLabs' names"):
            lora.merge({"a": file, "b": file}, "cat", tmp_path / "out")
        return
    result = lora.merge({"a": file, "b": file}, "cat", tmp_path / "out", weight=(1.0, 0.5))
    assert result.worst < 1e-5
    assert not (tmp_path / "out/adapter_config.json").exists()
    written = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert lora_kind(written) == lora_kind(load_file(file))
    shown = open_source(tmp_path / "out", base=open_source(base))
    for name, tensor in want.items():
        torch.testing.assert_close(shown.read(name), base[name] + 1.5 * (tensor - base[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["diffusers-weights", "kohya", "lycoris-lokr"])
def test_never_a_model(case: str, tmp_path: Path) -> None:
    """One sentence with what to do, in a folder too, with and without a base."""
    (tmp_path / "folder").mkdir()
    shutil.copy(FILES / f"{case}.safetensors", tmp_path / "folder/pytorch_lora_weights.safetensors")
    for path in (FILES / f"{case}.safetensors", tmp_path / "folder"):
        with pytest.raises(
            SourceError, match=r'a LoRA file.*, not a model: give .* "weightsmith lora merge"'
        ) as caught:
            ws.merge({"a": path, "b": path}, "average")
        assert "\n" not in str(caught.value)
    base, want = model(case)
    merged = ws.merge({"a": tmp_path / "folder"}, "task_arithmetic", base=base)
    for name, tensor in want.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("OFT", ["lycoris_fc.oft_blocks", "lycoris_fc.alpha"]),
        ("OFT", ["base_model.model.fc.oft_R.weight"]),
        (r"\(IA\)\^3", ["lora_unet_fc.weight", "lora_unet_fc.on_input"]),
        ("GLoRA", [f"lora_unet_fc.{part}" for part in ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha")]),
    ],
)
def test_adapters_of_other_kinds_are_no_models(kind: str, names: list[str], tmp_path: Path) -> None:
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match=f"an {kind} adapter .*, not a model"):
        ws.merge({"a": tmp_path / "x.safetensors", "b": tmp_path / "x.safetensors"}, "average")
    with pytest.raises(SourceError, match=f"an {kind} adapter "):
        lora.merge({"a": tmp_path / "x.safetensors", "b": tmp_path / "x.safetensors"}, "cat", tmp_path / "out")


def test_parts_of_a_pipeline_that_the_base_is_not_are_left_out(tmp_path: Path) -> None:
    """A file for U-Net and text encoder, on the U-Net alone."""
    both = load_file(FILES / "kohya.safetensors") | load_file(FILES / "kohya-text.safetensors")
    save_file(both, tmp_path / "both.safetensors")
    base, want = model("kohya")
    shown = open_source(tmp_path / "both.safetensors", base=open_source(base))
    assert set(shown.changed) == set(want)
    assert "2 modules of te are left out: tensors in memory has none of them" in shown.origin.remarks
    del base["down_blocks.0.resnets.0.conv1.weight"]
    with pytest.raises(
        SourceError, match="'lora_unet_down_blocks_0_resnets_0_conv1' belongs to no weight of tensors in"
    ):
        open_source(tmp_path / "both.safetensors", base=open_source(base))
    base, _ = model("kohya")
    base["down_blocks.0.resnets.0.conv1.weight"] = torch.zeros(4, 4, 1, 1)
    with pytest.raises(SourceError, match=r"adapts a weight of shape \[4, 4, 3, 3\], but .* is \[4, 4, 1, 1\]"):
        open_source(tmp_path / "both.safetensors", base=open_source(base))


def test_names_in_a_file_that_holds_a_whole_pipeline() -> None:
    base, want = model("kohya")
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in base.items()}
    shown = open_source(FILES / "kohya.safetensors", base=open_source(whole))
    for name, tensor in want.items():
        torch.testing.assert_close(shown.read(f"model.diffusion_model.{name}"), tensor, rtol=1e-5, atol=1e-5)


def test_files_that_are_damaged_or_mixed(tmp_path: Path) -> None:
    good = load_file(FILES / "kohya.safetensors")
    first = next(name for name in good if name.endswith("lora_down.weight"))
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "half": ({n: t for n, t in good.items() if n != first}, "instead of both factors"),
        "more": (
            {**good, "model.norm.weight": torch.ones(3)},
            "a LoRA file with tensors that are no part of a LoRA: model",
        ),
        "alpha": ({**good, first.replace("lora_down.weight", "alpha"): torch.tensor(0.0)}, "is 0, not a scale"),
        "shape": ({**good, first: torch.ones(3, 8)}, "has factors of shapes"),
    }
    for name, (tensors, text) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(SourceError, match=text):
            read_adapter(tmp_path / f"{name}.safetensors")
    with pytest.raises(PlanError, match="a is a LoRA of kohya, b of diffusers, whose names for modules differ"):
        lora.merge(
            {"a": FILES / "kohya.safetensors", "b": FILES / "diffusers-weights.safetensors"}, "cat", tmp_path / "out"
        )
    save_file({"base_model.model.m.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        SourceError, match=r"the weights of a PEFT adapter without its adapter_config\.json; give the folder"
    ):
        open_source(tmp_path / "adapter_model.safetensors", base=open_source({"m.weight": torch.ones(3, 3)}))


def test_a_grouped_convolution_is_combined_group_by_group(tmp_path: Path) -> None:
    """A is dense, B has a part per group: cat interleaves the ranks (peft's own cat does not)."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 4, 3, 3), torch.randn(6, 2, 1, 1)
    module = "base_model.model.conv"
    for name, scale in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        tensors = {f"{module}.lora_A.weight": scale * a, f"{module}.lora_B.weight": b}
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["conv"]}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    lora.merge({"a": tmp_path / "one", "b": tmp_path / "two"}, "cat", tmp_path / "out")
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    image = torch.randn(1, 4, 5, 5)

    def change(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(torch.nn.functional.conv2d(image, a, padding=1), b, groups=2)

    both = change(found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"])
    torch.testing.assert_close(both, 3 * change(a, b), rtol=1e-4, atol=1e-4)
