#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2: the weights of `set_adapters` after a call with scale 0, and after fuse and unfuse.
#
# Expected: a `scale` given to one call holds for that call; unfuse_lora() undoes fuse_lora(lora_scale=...), so that the
#   model runs as before and can be fused again at another scale.
# Seen: a call with scale 0 (the usual picture "without LoRA") computes the base, and then sets every adapter to 1,
#   whatever set_adapters said; other scales are undone.  fuse_lora(lora_scale=s) multiplies the scales of all active
#   adapters by s, also of those that are not fused, and unfuse_lora() leaves them so: what runs afterwards is s times
#   as strong, and the second fuse at 0.5 fuses 0.25.
# For a merge: after a comparison with and without the adapters, or a trial fuse, the weights are others than those that
#   were chosen.  Call set_adapters again before fusing.
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
from peft import LoraConfig

WEIGHTS = {"style": 0.5, "face": 0.25}
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
    attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
).eval()
LAYER = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
INPUTS = torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 3, 8)


def run(**options):
    with torch.no_grad():
        return unet(*INPUTS, cross_attention_kwargs=options or None).sample


def chosen():
    unet.set_adapters(list(WEIGHTS), list(WEIGHTS.values()))


seen = {}


def note(what):
    gap = float((run() - wanted).abs().max())
    seen[what] = [LAYER.to_q.scaling[name] for name in WEIGHTS]
    print(f"{what}: style, face at {seen[what][0]}, {seen[what][1]}; output off by {gap:.2f}")


base = run()
for name in WEIGHTS:
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False), name)
chosen()
wanted = run()
note("set_adapters")
run(scale=0.5)
note("after a call with scale 0.5")
assert torch.equal(run(scale=0.0), base)
note("after a call with scale 0")
chosen()
unet.fuse_lora(lora_scale=0.5, adapter_names=["style"])
unet.unfuse_lora()
note("after fuse_lora(0.5) of style, unfuse_lora()")
assert list(seen.values()) == [[0.5, 0.25], [0.5, 0.25], [1, 1], [0.25, 0.125]], "diffusers behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py"
# Output:
#   set_adapters: style, face at 0.5, 0.25; output off by 0.00
#   after a call with scale 0.5: style, face at 0.5, 0.25; output off by 0.00
#   after a call with scale 0: style, face at 1.0, 1.0; output off by 0.18
#   after fuse_lora(0.5) of style, unfuse_lora(): style, face at 0.25, 0.125; output off by 0.05
