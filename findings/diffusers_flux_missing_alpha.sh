#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2: LoRA files for Flux in diffusers' names with `.alpha` tensors, of which one is missing.
#
# Expected: a layer without alpha gets the most common one of the file, as the code says
#   (`Counter(network_alpha_dict.values()).most_common()`), or alpha = rank, as the loader for kohya's names does.
# Seen: it gets the first alpha of the file.  The values are tensors here, which Counter tells apart by identity, so each
#   occurs once.  Three layers have 1, 4 and 4 (rank 2): the fourth runs at 1 / 2, not at 4 / 2 and not at 1.
# For a merge: what the missing alpha is depends on how the names sort.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate
cat > "$work/run.py" <<'PY'
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin as Loader

RANK, BLOCK = 2, "transformer_blocks.0.attn."
ALPHAS = {"to_k": 1.0, "to_q": 4.0, "to_v": 4.0, "to_out.0": None}
model = FluxTransformer2DModel(
    in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=6, num_attention_heads=2,
    joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 2),
)
state = {}
for name, alpha in ALPHAS.items():
    layer = f"transformer.{BLOCK}{name}"
    state |= {f"{layer}.lora_A.weight": torch.randn(RANK, 12), f"{layer}.lora_B.weight": torch.randn(12, RANK)}
    if alpha is not None:
        state[f"{layer}.alpha"] = torch.tensor(alpha)
found, alphas = Loader.lora_state_dict(state, return_alphas=True)
Loader.load_lora_into_transformer(found, alphas, model)
seen = {name: next(iter(model.get_submodule(BLOCK + name).scaling.values())) for name in ALPHAS}
for name, alpha in ALPHAS.items():
    print(f"{name}: alpha {alpha}, loaded with scale {float(seen[name])}")
assert float(seen["to_out.0"]) == 1 / RANK, "diffusers behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py"
# Output:
#   to_k: alpha 1.0, loaded with scale 0.5
#   to_q: alpha 4.0, loaded with scale 2.0
#   to_v: alpha 4.0, loaded with scale 2.0
#   to_out.0: alpha None, loaded with scale 0.5
