#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2: LoRA files for Flux in kohya's or ComfyUI's names, with layers outside of the blocks.
#
# Expected: layers outside of the blocks (img_in, txt_in, time_in, vector_in: kohya's `in_dims`; final_layer) are loaded
#   like those of the blocks, or refused, or named in a warning.
# Seen: they are converted (`img_in` becomes `x_embedder`), but without the `transformer.` in front that those of the
#   blocks get, and the loader takes only what starts with it.  The adapter loads without them and without a word.
# For a merge: the file has more than the pipeline shows.  Merged into the original names, as it was trained, the result
#   differs from what diffusers draws with the same file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate
cat > "$work/run.py" <<'PY'
import sys

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

RANK = 2
LAYERS = {
    "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
    "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
UNUSED = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
for style in ("kohya", "ComfyUI"):
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=6, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 2),
    )
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), transformer=model, **dict.fromkeys(UNUSED))
    state = {}
    for name, layer in LAYERS.items():
        key = "lora_unet_" + name.replace(".", "_") if style == "kohya" else f"diffusion_model.{name}"
        found = model.get_submodule(layer)
        state[f"{key}.lora_down.weight"] = torch.randn(RANK, found.in_features)
        state[f"{key}.lora_up.weight"] = torch.randn(found.out_features, RANK)
        state[f"{key}.alpha"] = torch.tensor(float(RANK))
    save_file(state, f"{sys.argv[1]}/lora.safetensors")
    pipeline.load_lora_weights(sys.argv[1], weight_name="lora.safetensors")
    lost = [n for n, layer in LAYERS.items() if not isinstance(model.get_submodule(layer), BaseTunerLayer)]
    print(f"{style}: loaded {len(LAYERS) - len(lost)} layers of {len(LAYERS)}, not {' '.join(lost)}")
    assert lost == list(LAYERS)[2:], "diffusers behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py" "$work"
# Output:
#   kohya: loaded 2 layers of 8, not img_in txt_in time_in.in_layer vector_in.in_layer final_layer.linear (...)
#   ComfyUI: loaded 2 layers of 8, not img_in txt_in time_in.in_layer vector_in.in_layer final_layer.linear (...)
