"""Make the LoRA files beside this script, and what the libraries that own them make of a model with each.

Run with torch 2.13.0, diffusers 0.42.1, peft 0.21.2, transformers 5.23.0 and lycoris-lora 4.1.3:

    python tests/io/lora_files/make.py

<case>.safetensors        the LoRA file
<case>-model.safetensors  `base.NAME`: weights of the model; `want.NAME`: those that change, in the running model
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders.lora_pipeline import (
    FluxLoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
)
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

HERE = Path(__file__).parent
State = dict[str, Tensor]


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, norm_num_groups=2, cross_attention_dim=6,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def unet_xl() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 4, 8), layers_per_block=2, sample_size=8, norm_num_groups=2, cross_attention_dim=6,
        attention_head_dim=2, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def flux() -> nn.Module:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=6, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 2),
    ).eval()  # fmt: skip


def text() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=20, max_position_embeddings=8, **sizes)).eval()


def changed(before: nn.Module, model: nn.Module) -> State:
    """The weights that a running peft model uses, where they are not the base's."""
    found = {}
    old = before.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.scaling
            found[f"{name}.weight"] = layer.get_base_layer().weight + layer.get_delta_weight(adapter)
            assert f"{name}.weight" in old
    return {name: value.detach().clone() for name, value in found.items()}


def keep(case: str, lora: State, before: nn.Module, want: State, notes: dict[str, str] | None = None) -> None:
    prefix = "text_model." if isinstance(before, CLIPTextModel) else ""  # as such folders lie on the hub
    modules = {n.rpartition(".")[0] for n in want} | {"down_blocks.0.resnets.1.conv1"}  # which tells layers per block
    base = {f"base.{prefix}{n}": t for n, t in before.state_dict().items() if n.rpartition(".")[0] in modules}
    save_file({n: t.contiguous() for n, t in lora.items()}, HERE / f"{case}.safetensors", notes)
    every = base | {f"want.{prefix}{n}": t for n, t in want.items()}
    save_file({n: t.detach().contiguous() for n, t in every.items()}, HERE / f"{case}-model.safetensors")
    print(case, len(lora), "tensors,", len(want), "weights change")


def noise(*shape: int) -> Tensor:
    return 0.3 * torch.randn(shape)


# --- diffusers -----------------------------------------------------------------------------------------


def of_diffusers() -> None:
    config = {"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_k", "conv1"], "init_lora_weights": False}
    patterns = {"rank_pattern": {"conv1": 4}, "alpha_pattern": {"to_k": 3}}
    for case, more in (("diffusers-adapter", patterns), ("diffusers-weights", {}), ("diffusers-noted", patterns)):
        model = unet()
        model.add_adapter(LoraConfig(**config, **more))
        folder = HERE / "tmp"
        if case == "diffusers-adapter":
            model.save_lora_adapter(folder)
        else:
            notes = {"unet_lora_adapter_metadata": model.peft_config["default"].to_dict()} if more else {}
            StableDiffusionLoraLoaderMixin.save_lora_weights(folder, get_peft_model_state_dict(model), **notes)
        file = folder / "pytorch_lora_weights.safetensors"
        back, source = unet(), StableDiffusionLoraLoaderMixin
        if case == "diffusers-adapter":
            back.load_lora_adapter(folder, prefix=None, weight_name=file.name, use_safetensors=True)
        else:
            state, alphas, metadata = source.lora_state_dict(folder, return_lora_metadata=True)
            source.load_lora_into_unet(state, alphas, back, metadata=metadata)
        header = file.read_bytes()
        length = int.from_bytes(header[:8], "little")
        keep(case, load_file(file), unet(), changed(unet(), back), json.loads(header[8 : 8 + length])["__metadata__"])
        file.unlink()
        folder.rmdir()


def of_early_diffusers() -> None:
    """Attention processors' names (`processor.to_q_lora.down`), as until diffusers 0.17."""
    torch.manual_seed(1)
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor"
    lora = {}
    for name, (outputs, inputs) in {"to_q": (8, 8), "to_out": (8, 8)}.items():
        lora |= {
            f"{module}.{name}_lora.down.weight": noise(2, inputs),
            f"{module}.{name}_lora.up.weight": noise(outputs, 2),
        }
    back, source = unet(), StableDiffusionLoraLoaderMixin
    source.load_lora_into_unet(*source.lora_state_dict(dict(lora)), back)
    keep("diffusers-early", lora, unet(), changed(unet(), back))


# --- kohya ---------------------------------------------------------------------------------------------


def factors(weights: dict[str, Tensor], rank: int = 2, alpha: Callable[[int], float | None] = lambda i: 1.0) -> State:
    """A kohya file for weights by its names; alpha of the i-th module, or None for none."""
    lora: State = {}
    for i, (name, weight) in enumerate(weights.items()):
        outputs, inputs, *kernel = weight.shape
        lora[f"{name}.lora_down.weight"] = noise(rank, inputs, *kernel)
        lora[f"{name}.lora_up.weight"] = noise(outputs, rank, *[1] * len(kernel))
        if (value := alpha(i)) is not None:
            lora[f"{name}.alpha"] = torch.tensor(value)
    return lora


def of_kohya() -> None:
    state = unet().state_dict()
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    modules = (f"{block}.attn1.to_q", f"{block}.attn2.to_k", f"{block}.ff.net.0.proj", f"{block}.attn1.to_out.0",
               "down_blocks.1.attentions.0.proj_in", "down_blocks.0.resnets.0.conv1")  # fmt: skip
    weights = {f"lora_unet_{m.replace('.', '_')}": state[f"{m}.weight"] for m in modules}
    source = StableDiffusionLoraLoaderMixin
    # diffusers finds the alphas of attention modules only where they are the most common one.
    all_: dict[int, float] = {0: 2.0, 1: 2.0, 2: 3.0, 3: 2.0, 4: 5.0, 5: 6.0}
    some: dict[int, float] = {0: 4.0, 1: 4.0, 2: 1.0}
    for case, alpha in (
        ("kohya", all_.get),
        ("kohya-no-alpha", lambda i: None),
        ("kohya-some-alphas", some.get),
    ):
        torch.manual_seed(2)
        lora, back = factors(weights, alpha=alpha), unet()
        source.load_lora_into_unet(*source.lora_state_dict(dict(lora)), back)
        keep(case, lora, unet(), changed(unet(), back))


def of_kohya_text() -> None:
    torch.manual_seed(3)
    state = text().state_dict()
    modules = [name.removesuffix(".weight") for name in state if name.endswith(("fc1.weight", "fc2.weight"))]
    weights = {f"lora_te_text_model_{m.replace('.', '_')}": state[f"{m}.weight"] for m in modules}
    lora, back = factors(weights, alpha=lambda i: (3.0, None)[i]), text()
    source = StableDiffusionLoraLoaderMixin
    found, alphas = source.lora_state_dict(dict(lora))
    source.load_lora_into_text_encoder(found, alphas, back, prefix="text_encoder")
    keep("kohya-text", lora, text(), changed(text(), back))


def of_kohya_xl() -> None:
    """Names of the original U-Net, which numbers its blocks through."""
    torch.manual_seed(4)
    state, model = unet_xl().state_dict(), unet_xl()
    names = {
        "input_blocks_0_0": "conv_in",
        "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_1_transformer_blocks_0_ff_net_2": "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
        "input_blocks_5_1_proj_in": "down_blocks.1.attentions.1.proj_in",
        "input_blocks_8_0_emb_layers_1": "down_blocks.2.resnets.1.time_emb_proj",
        "middle_block_1_transformer_blocks_0_attn2_to_v": "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_0_1_transformer_blocks_0_attn1_to_k": "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_4_0_skip_connection": "up_blocks.1.resnets.1.conv_shortcut",
        "time_embed_0": "time_embedding.linear_1",
    }
    weights = {f"lora_unet_{name}": state[f"{module}.weight"] for name, module in names.items()}
    alphas = {n: 2.0 if "attn" in m else 1.0 + i % 3 for i, (n, m) in enumerate(names.items())}
    lora = factors(weights, alpha=lambda i: [*alphas.values()][i])
    source = StableDiffusionXLLoraLoaderMixin
    source.load_lora_into_unet(*source.lora_state_dict(dict(lora), unet_config=model.config), model)
    want = changed(unet_xl(), model)
    assert want.keys() == {f"{module}.weight" for module in names.values()}, want.keys() ^ names.values()
    keep("kohya-xl", lora, unet_xl(), want)


def of_kohya_flux() -> None:
    """Fused matrices, which diffusers stores in parts; modules without alpha have scale 1."""
    torch.manual_seed(5)
    sizes = {"double_blocks_0_img_attn_qkv": (36, 12), "double_blocks_0_txt_attn_qkv": (36, 12),
             "double_blocks_0_img_mlp_0": (48, 12), "double_blocks_0_txt_attn_proj": (12, 12),
             "double_blocks_0_img_mod_lin": (72, 12), "single_blocks_0_linear2": (12, 60)}  # fmt: skip
    weights = {f"lora_unet_{name}": torch.empty(size) for name, size in sizes.items()}
    lora, source, model = factors(weights, alpha=lambda i: (1.0, None, 4.0)[i % 3]), FluxLoraLoaderMixin, flux()
    found, alphas = source.lora_state_dict(dict(lora), return_alphas=True)
    source.load_lora_into_transformer(found, alphas, model)
    keep("kohya-flux", lora, flux(), changed(flux(), model))


def of_flux() -> None:
    """diffusers' names with alphas, of which one is missing; XLabs' names (`processor.qkv_lora1.down`)."""
    torch.manual_seed(10)
    block = "transformer.transformer_blocks.0.attn."
    alphas: State = {}
    for name, alpha in {"to_k": 1.0, "to_q": 4.0, "to_v": 4.0, "to_out.0": None}.items():
        alphas |= {f"{block}{name}.lora_A.weight": noise(2, 12), f"{block}{name}.lora_B.weight": noise(12, 2)}
        if alpha is not None:
            alphas[f"{block}{name}.alpha"] = torch.tensor(alpha)
    xlabs: State = {}
    for name, (outputs, inputs) in {
        "double_blocks.0.processor.qkv_lora1": (36, 12), "double_blocks.0.processor.proj_lora2": (12, 12),
        "single_blocks.0.processor.qkv_lora": (36, 12), "single_blocks.0.processor.proj_lora": (12, 60),
    }.items():  # fmt: skip
        xlabs |= {f"{name}.down.weight": noise(2, inputs), f"{name}.up.weight": noise(outputs, 2)}
    for case, lora in (("diffusers-flux-alphas", alphas), ("xlabs-flux", xlabs)):
        model, source = flux(), FluxLoraLoaderMixin
        save_file(lora, HERE / f"{case}.safetensors")  # an alpha that is missing is the first one of the file
        state = load_file(HERE / f"{case}.safetensors")
        source.load_lora_into_transformer(*source.lora_state_dict(state, return_alphas=True), model)
        keep(case, lora, flux(), changed(flux(), model))


# --- LyCORIS -------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.norm, self.proj = nn.LayerNorm(8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(self.point(self.conv(x)).flatten(2).mT))


def of_lycoris() -> None:
    image = torch.linspace(-1, 1, 100).reshape(1, 4, 5, 5)
    cases: dict[str, dict[str, Any]] = {
        "lycoris-locon": {"algo": "lora", "conv_dim": 2, "conv_alpha": 3},
        "lycoris-locon-middle": {"algo": "lora", "conv_dim": 2, "conv_alpha": 3, "use_tucker": True},
        "lycoris-dora": {"algo": "lora", "conv_dim": 2, "conv_alpha": 3, "dora_wd": True},
        "lycoris-dora-inputs": {"algo": "lora", "conv_dim": 2, "conv_alpha": 3, "dora_wd": True, "wd_on_output": False},
        "lycoris-loha": {"algo": "loha", "conv_dim": 2, "conv_alpha": 3},
        "lycoris-loha-middle": {"algo": "loha", "conv_dim": 2, "conv_alpha": 3, "use_tucker": True},
        "lycoris-lokr": {"algo": "lokr", "conv_dim": 1, "conv_alpha": 3, "linear_dim": 1, "factor": 2},
        "lycoris-lokr-both": {"algo": "lokr", "conv_dim": 1, "conv_alpha": 3, "linear_dim": 1, "factor": 4,
                              "decompose_both": True},
        "lycoris-lokr-whole": {"algo": "lokr", "conv_dim": 64, "conv_alpha": 3, "linear_dim": 64, "full_matrix": True},
        "lycoris-lokr-middle": {"algo": "lokr", "conv_dim": 1, "conv_alpha": 3, "factor": 2, "use_tucker": True},
        "lycoris-full": {"algo": "full", "train_norm": True},
    }  # fmt: skip
    for case, options in cases.items():
        torch.manual_seed(6)
        base = Small().eval()
        LycorisNetwork.apply_preset({"target_module": ["Conv2d", "Linear", "LayerNorm"]})
        running = copy.deepcopy(base)
        net = create_lycoris(running, 1.0, **{"linear_dim": 2, "linear_alpha": 3.0, **options})
        net.eval()
        net.apply_to()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(parameter.abs() + 0.2 if "dora_scale" in name else parameter + noise(*parameter.shape))
        model = copy.deepcopy(base)
        want: State = {}
        old = base.state_dict()
        with torch.no_grad():
            for lora in net.loras:
                (module,) = [n for n, m in base.named_modules() if f"lycoris_{n.replace('.', '_')}" == lora.lora_name]
                weight = old[f"{module}.weight"]
                if type(lora).__name__ == "FullModule":
                    want[f"{module}.weight"], want[f"{module}.bias"] = lora.weight.clone(), lora.bias.clone()
                elif type(lora).__name__ == "NormModule":
                    want[f"{module}.weight"], want[f"{module}.bias"] = (
                        weight + lora.w_norm,
                        old[f"{module}.bias"] + lora.b_norm,
                    )
                else:  # what forward() adds; merge_to() and get_diff_weight() apply the scale of LoHa and LoKr twice
                    delta = (
                        lora.get_weight(weight.shape)
                        if hasattr(lora, "get_weight")
                        else lora.make_weight() * lora.scale
                    )
                    full = weight + delta.reshape(weight.shape)
                    want[f"{module}.weight"] = lora.apply_weight_decompose(full) if lora.wd else full
        model.load_state_dict({**old, **want})
        torch.testing.assert_close(model(image), running(image), rtol=1e-5, atol=1e-5)
        keep(case, {n: t.detach() for n, t in net.state_dict().items()}, base, want)


if __name__ == "__main__":
    for run in (
        of_diffusers,
        of_early_diffusers,
        of_kohya,
        of_kohya_text,
        of_kohya_xl,
        of_kohya_flux,
        of_flux,
        of_lycoris,
    ):
        run()
