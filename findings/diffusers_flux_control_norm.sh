#!/usr/bin/env bash
# diffusers 0.42.1: control LoRA files for Flux in Black Forest Labs' own names (FLUX.1-Depth-dev-lora, Canny-dev-lora).
#
# Expected: `final_layer.adaLN_modulation.1` becomes `norm_out.linear` with scale and shift in diffusers' order: the
#   halves of the outputs change places, swap(B A) = swap(B) A.
# Seen: both factors are swapped.  The halves of A are ranks, not outputs: rank i of B meets rank i + r / 2 of A, and
#   the change is as far from the trained one as a random one.  Other code, which swaps B only, converts kohya's names.
# For a merge: add B A in the original names, or swap B alone; what diffusers runs is no reference for this layer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate
cat > "$work/run.py" <<'PY'
import torch
from diffusers.loaders import FluxLoraLoaderMixin as Loader

RANK, WIDTH, INPUTS = 4, 3072, 64  # the converter knows Flux's own width and depth; inputs do not matter to it
LAST = "final_layer.adaLN_modulation.1"
EMBEDDERS = [f"{name}_in.{layer}" for name in ("time", "vector", "guidance") for layer in ("in_layer", "out_layer")]
outputs = dict.fromkeys(["img_in", "txt_in", *EMBEDDERS], 1) | {"final_layer.linear": 1, LAST: 2}
norms = []
for i in range(19):
    for part in ("img", "txt"):
        block = f"double_blocks.{i}.{part}"
        outputs |= {f"{block}_mod.lin": 6, f"{block}_attn.qkv": 3, f"{block}_attn.proj": 1}
        outputs |= {f"{block}_mlp.0": 4, f"{block}_mlp.2": 1}
        norms.append(f"{block}_attn.norm")
for i in range(38):
    block = f"single_blocks.{i}"
    outputs |= {f"{block}.modulation.lin": 3, f"{block}.linear1": 7, f"{block}.linear2": 1}
    norms.append(f"{block}.norm")
torch.manual_seed(0)
state = {}
for name, widths in outputs.items():
    state[f"{name}.lora_A.weight"] = torch.randn(RANK, INPUTS)
    state[f"{name}.lora_B.weight"] = torch.randn(widths * WIDTH, RANK)
for name in norms:
    state |= {f"{name}.{which}_norm.scale": torch.ones(1) for which in ("query", "key")}
down, up = (state[f"{LAST}.lora_{factor}.weight"] for factor in "AB")
found = Loader.lora_state_dict(dict(state))
a, b = (found[f"transformer.norm_out.linear.lora_{factor}.weight"] for factor in "AB")


def swap(weight):
    shift, scale = weight.chunk(2)
    return torch.cat([scale, shift])


def off(change):
    return float((change - swap(up @ down)).norm() / (up @ down).norm())


print(f"B A as loaded is off by {off(b @ a):.2f} of its size; with A as in the file by {off(b @ down):.2f}")
assert off(b @ a) > 0.5 and off(b @ down) == 0 and torch.equal(a, swap(down)), "diffusers behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py"
# Output:
#   B A as loaded is off by 1.38 of its size; with A as in the file by 0.00
