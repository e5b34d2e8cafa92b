#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2: a kohya LoRA file whose attention layers have different alphas.
#
# Expected: each layer is scaled by its own alpha / rank, as kohya trained it and as the `.alpha` tensors say.
# Seen: layers outside the attention (ff.net) get their own alpha; all attention layers get one alpha, the one that is
#   most common in the whole file (here 1, which only to_k and ff.net.2 have), whatever theirs says: to_v, alpha 8 at
#   rank 4, runs at 0.25 in place of 2.0.  peft warns that "alpha_pattern keys did not match any targeted module", by names
#   (`...attn1.processor.to_q_lora.down.weight`) that neither the file nor the model has.  Equal alphas are not hurt.
# For a merge: "alpha / rank of each layer" and "what the pipeline shows" are two different models for such a file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate
cat > "$work/run.py" <<'PY'
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

RANK = 4
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0."
ALPHAS = {"attn1.to_q": 2, "attn1.to_k": 1, "attn1.to_v": 8, "ff.net.0.proj": 3, "ff.net.2": 1}
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
    attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


def kohya(alphas):
    state = {}
    for name, alpha in alphas.items():
        layer = unet.get_submodule(BLOCK + name)
        key = "lora_unet_" + (BLOCK + name).replace(".", "_")
        state[f"{key}.lora_down.weight"] = torch.randn(RANK, layer.in_features)
        state[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, RANK)
        state[f"{key}.alpha"] = torch.tensor(float(alpha))
    return state


state, alphas = Loader.lora_state_dict(kohya(ALPHAS))[:2]
Loader.load_lora_into_unet(state, alphas, unet)
seen = {name: next(iter(unet.get_submodule(BLOCK + name).scaling.values())) for name in ALPHAS}
for name, alpha in ALPHAS.items():
    print(f"{name}: alpha / rank {alpha / RANK}, loaded with {seen[name]}")
wanted = {name: (1 if "attn" in name else alpha) / RANK for name, alpha in ALPHAS.items()}
assert seen == wanted, "diffusers behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py"
# Output:
#   attn1.to_q: alpha / rank 0.5, loaded with 0.25
#   attn1.to_k: alpha / rank 0.25, loaded with 0.25
#   attn1.to_v: alpha / rank 2.0, loaded with 0.25
#   ff.net.0.proj: alpha / rank 0.75, loaded with 0.75
#   ff.net.2: alpha / rank 0.25, loaded with 0.25
