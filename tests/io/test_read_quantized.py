"""Quantised checkpoints: 8-bit floats times their scales, everything packed refused when it is opened."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weightsmith as ws
from weightsmith.core.errors import SourceError
from weightsmith.io.read.open import open_source
from weightsmith.io.read.quantized import ScaledSource

NAME = "model.layers.0.mlp.up_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def folder(path: Path, tensors: dict[str, torch.Tensor], quantised: dict[str, Any] | None, **config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    entry = {} if quantised is None else {"quantization_config": quantised}
    (path / "config.json").write_text(json.dumps({"model_type": "x", "dtype": "bfloat16", **config, **entry}))
    return path


def quantised(
    value: torch.Tensor, block: tuple[int, int] = (128, 128)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(8-bit weights, scale per block, what they stand for), block by block."""
    rows, columns = (-(-n // b) for n, b in zip(value.shape, block, strict=True))
    stored, exact = torch.empty(value.shape, dtype=torch.float8_e4m3fn), torch.empty(value.shape)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = value[at].abs().max() / 448
            stored[at] = (value[at] / scales[i, j]).to(torch.float8_e4m3fn)
            exact[at] = stored[at].float() * scales[i, j]
    return stored, scales, exact


def test_blocks_of_deepseek_and_qwen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    value = torch.randn(300, 200) * torch.logspace(-2, 2, 300)[:, None]
    stored, scales, exact = quantised(value)
    norm = torch.randn(200).bfloat16()
    tensors = {NAME: stored, f"{NAME}_scale_inv": scales, "model.norm.weight": norm}
    source = pickle.loads(pickle.dumps(open_source(folder(tmp_path / "m", tensors, FP8))))
    assert isinstance(source, ScaledSource)
    assert set(source.keys) == {NAME, "model.norm.weight"}
    assert source.key(NAME).dtype == "bfloat16"
    assert source.computes(NAME)
    assert not source.computes("model.norm.weight")
    assert torch.equal(source.read(NAME), exact)
    for start, stop in ((0, 1), (127, 129), (130, 257), (299, 300), (5, 5)):
        assert torch.equal(source.read(NAME, start, stop), exact[start:stop])
    assert torch.equal(source.read("model.norm.weight"), norm)
    assert float((exact - value).abs().max() / value.abs().max()) < 0.07


@pytest.mark.parametrize("shape", [(6, 1), (6,), (), (1,), (1, 1)])
def test_scales_of_rows_and_tensors(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored, scale = torch.randn(6, 4).to(torch.float8_e4m3fn), torch.rand(shape) + 0.5
    tensors = {NAME: stored, f"{NAME}_scale": scale, NAME.replace("weight", "input_scale"): torch.tensor(2.0)}
    source = open_source(folder(tmp_path / "m", tensors, {"quant_method": "compressed-tensors"}))
    assert list(source.keys) == [NAME]
    want = stored.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(()))
    assert torch.equal(source.read(NAME), want)
    assert torch.equal(source.read(NAME, 2, 5), want[2:5])


def test_packed_experts_have_blocks_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "model.layers.0.mlp.experts.down_proj"
    parts = [quantised(torch.randn(6, 8), (4, 4)) for _ in range(3)]
    stored, scales, exact = (torch.stack(found) for found in zip(*parts, strict=True))
    config = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    source = open_source(folder(tmp_path / "m", {name: stored, f"{name}_scale_inv": scales}, config))
    assert torch.equal(source.read(name), exact)
    assert torch.equal(source.read(name, 1, 3), exact[1:])


def test_a_merge_of_fp8_models_says_it_is_not_quantised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = {}
    for name in ("base", "tuned"):
        stored, scales, made[name] = quantised(torch.randn(130, 140))
        folder(tmp_path / name, {NAME: stored, f"{NAME}_scale_inv": scales}, FP8, torch_dtype="bfloat16")
    recipe = ws.Recipe.model_validate({
        "base": str(tmp_path / "base"), "models": {"t": str(tmp_path / "tuned")}, "method": "task_arithmetic",
        "parameters": {"lambda": 0.5},
    })  # fmt: skip
    recipe.run(tmp_path / "out")
    out = load_file(tmp_path / "out/model.safetensors")
    assert list(out) == [NAME]
    want = (made["base"] + 0.5 * (made["tuned"] - made["base"])).bfloat16()
    assert torch.equal(out[NAME], want)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"model_type": "x", "dtype": "bfloat16", "torch_dtype": "bfloat16"}


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "mxfp4", "torchao", "unheard_of"])
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    made = folder(tmp_path / "m", {NAME: torch.ones(2, 2)}, {"quant_method": method})
    with pytest.raises(
        SourceError, match=rf"quant_method = '{method}', which cannot be merged; merge the models it was"
    ):
        open_source(made)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.qweight", "a.qzeros"], "GPTQ or AWQ"),
        (["a.weight", "a.weight.absmax"], "bitsandbytes, 4 bits"),
        (["a.weight", "a.SCB"], "bitsandbytes, 8 bits"),
        (["a.weight_packed"], "compressed-tensors, packed integers"),
        (["a.experts.gate_up_proj_blocks", "a.experts.gate_up_proj_scales"], "MXFP4"),
    ],
)
def test_packed_weights_are_known_by_their_names(names: list[str], kind: str, tmp_path: Path) -> None:
    made = folder(tmp_path / "m", {name: torch.ones(2, 2, dtype=torch.uint8) for name in names}, None)
    for ref in (made, made / "model.safetensors"):
        with pytest.raises(SourceError, match=rf"quantised weights \({kind}"):
            open_source(ref)


def test_plain_models_are_left_alone_and_odd_scales_refused(tmp_path: Path) -> None:
    plain = folder(tmp_path / "plain", {NAME: torch.ones(2, 2), "my_blocks": torch.ones(1)}, None)
    assert not isinstance(open_source(plain), ScaledSource)
    bits = torch.ones(6, 4).to(torch.float8_e4m3fn)
    bare = folder(tmp_path / "bare", {NAME: bits}, None)  # 8-bit floats without scales are what they say
    assert not isinstance(open_source(bare), ScaledSource)
    odd = folder(tmp_path / "odd", {NAME: bits, f"{NAME}_scale_inv": torch.ones(3, 2)}, FP8)
    with pytest.raises(SourceError, match=r"_scale_inv of shape \[3, 2\] does not fit weights of shape \[6, 4\]"):
        open_source(odd)
    lone = {NAME: bits, f"{NAME}_scale_inv": torch.ones(1, 1), "other.weight": bits.clone()}
    with pytest.raises(SourceError, match=r"other\.weight is in 8 bits without the scale"):
        open_source(folder(tmp_path / "lone", lone, FP8))


MODULE = NAME.removesuffix(".weight")


@pytest.mark.parametrize("scale", ["scale", "qscale_weight", "scale_weight"])
def test_scales_have_other_names_too(scale: str, tmp_path: Path) -> None:
    """transformers 5.24 loads the first two for any model; the third is ComfyUI's."""
    torch.manual_seed(0)
    stored, scales, exact = quantised(torch.randn(130, 140))
    tensors = {NAME: stored, f"{MODULE}.{scale}": scales, f"{MODULE}.qscale_act": torch.tensor(2.0)}
    norm = {"model.norm.scale": torch.ones(4)}  # no scale of a weight
    source = open_source(folder(tmp_path / "m", {**tensors, **norm}, FP8))
    assert set(source.keys) == {NAME, *norm}
    assert torch.equal(source.read(NAME), exact)


def test_single_files_of_comfyui(tmp_path: Path) -> None:
    """One scale per weight; the markers go, and no config.json says the dtype: the neighbours do."""
    torch.manual_seed(0)
    stored, bias = torch.randn(6, 4).to(torch.float8_e4m3fn), torch.ones(6, dtype=torch.float16)
    rest = {f"{MODULE}.bias": bias}
    old = {NAME: stored, f"{MODULE}.scale_weight": torch.tensor([0.5]), f"{MODULE}.scale_input": torch.tensor([3.0])}
    save_file({**old, **rest, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "old.safetensors")
    note = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    new = {NAME: stored, f"{NAME}_scale": torch.tensor(0.5), f"{MODULE}.comfy_quant": note}
    save_file({**new, **rest}, tmp_path / "new.safetensors")
    for name in ("old", "new"):
        source = open_source(tmp_path / f"{name}.safetensors")
        assert set(source.keys) == {NAME, f"{MODULE}.bias"}
        assert source.key(NAME).dtype == "float16"
        assert torch.equal(source.read(NAME), stored.float() / 2)
    blocks = {**new, f"{NAME}_scale": torch.full((6, 1), 127, dtype=torch.uint8)}
    save_file(blocks, tmp_path / "blocks.safetensors")
    with pytest.raises(SourceError, match=r"quantised weights \(ComfyUI, scales of blocks: .*weight_scale\)"):
        open_source(tmp_path / "blocks.safetensors")


@pytest.mark.parametrize("width", [32, 96])
def test_mxfp8_has_exponents_for_32_entries_each(width: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored = torch.randn(5, width).to(torch.float8_e4m3fn)
    exponents = torch.randint(100, 140, (5, width // 32), dtype=torch.uint8)
    exponents[0, 0], exponents[1, 0] = 0, 250
    exact = stored.double() * (2.0 ** (exponents.double() - 127)).repeat_interleave(32, 1)
    tensors = {NAME: stored, f"{NAME}_scale": exponents}
    source = open_source(folder(tmp_path / "m", tensors, {"quant_method": "compressed-tensors", "format": "mxfp8"}))
    assert torch.equal(source.read(NAME), exact.float())
    assert torch.equal(source.read(NAME, 2, 4), exact[2:4].float())


CODES = torch.ones(16, 64, dtype=torch.int8)
ROWS = torch.ones(16, 1)


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"l.weight": CODES, "l.weight_scale": ROWS}, "int8 with scales: l.weight, l.weight_scale"),
        ({"l._weight_qdata": CODES, "l._weight_scale": ROWS}, "torchao: l._weight_qdata"),
        ({"l._weight_qdata": CODES.to(torch.float8_e4m3fn), "l._weight_scale": ROWS}, "torchao: l._weight_qdata"),
        ({"l.weight": CODES.to(torch.uint32), "l.scales": ROWS, "l.biases": ROWS + 1}, "MLX: l.weight, l.scales"),
        ({"l.weight": CODES.to(torch.uint32), "l.scales": ROWS.to(torch.uint8)}, "MLX: l.weight, l.scales"),
    ],
    ids=["w8a8", "torchao-int8", "torchao-float8", "mlx", "mlx-mxfp4"],
)
@pytest.mark.parametrize("config", [None, {"quant_method": "compressed-tensors", "format": "int-quantized"}])
def test_integers_with_scales_are_quantised_whatever_the_config_says(
    tensors: dict[str, torch.Tensor], kind: str, config: dict[str, Any] | None, tmp_path: Path
) -> None:
    made = folder(tmp_path / "m", tensors, config)
    for ref in (made, made / "model.safetensors"):
        with pytest.raises(SourceError) as caught:
            open_source(ref)
        assert f"quantised weights ({kind}) cannot be merged; merge the models it was" in str(caught.value)


def test_unknown_scales_are_refused(tmp_path: Path) -> None:
    bits = torch.ones(6, 4).to(torch.float8_e4m3fn)
    names = (f"{MODULE}.new_scales", f"{NAME}_rescale", f"{NAME}.my_scale", f"{MODULE}_scale")
    for i, scale in enumerate((*names, f"{NAME}_s", f"{NAME}_inv_s", f"{MODULE}.dequant_scl")):
        made = folder(tmp_path / f"m{i}", {NAME: bits, scale: torch.ones(6, 1)}, None)
        with pytest.raises(
            SourceError, match=rf"\(8-bit floats: {NAME}\) with a scale that is not known here, {scale}"
        ):
            open_source(made)


def test_other_integers_and_scales_are_no_codes(tmp_path: Path) -> None:
    """Swin's tables of positions beside a learned scale; a norm of 8 bits whose weight is called scale."""
    tensors = {
        "attn.relative_position_index": torch.ones(9, 9, dtype=torch.int64),
        "attn.logit_scale": torch.ones(3, 1, 1),
        "norm.scale": torch.ones(4).to(torch.float8_e4m3fn),
    }
    assert set(open_source(folder(tmp_path / "m", tensors, None)).keys) == set(tensors)
