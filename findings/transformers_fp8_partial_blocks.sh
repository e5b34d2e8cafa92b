#!/usr/bin/env bash
# transformers 5.23.0: 8-bit weights with scales of blocks, whose rows or columns are no multiple of the block.
#
# Expected: `weight_block_size` of config.json says how many rows and columns share a scale, as for the kernels; the last
#   block is a shorter one (48 rows in blocks of 32: 32 and 16).
# Seen: with `FineGrainedFP8Config(dequantize=True)` the block size is taken from the shapes: 48 rows and 2 scales are two
#   blocks of 24, so that rows 24 to 31 get the second scale in place of the first, without a word.  Where rows are no
#   multiple of the number of scales (DeepSeek-V3's 576 rows in blocks of 128: 5 scales) it raises.
# For a merge: what transformers makes of such a file is no reference for its weights.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.23.0 accelerate
cat > "$work/run.py" <<'PY'
import json
import os
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

os.chdir(sys.argv[1])
BLOCK, NAME = 32, "model.layers.0.mlp.up_proj.weight"
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, dtype="bfloat16"
)
LlamaForCausalLM(config).bfloat16().save_pretrained("m")
stored = {}
for name, weight in load_file("m/model.safetensors").items():
    stored[name] = weight
    if "_proj" in name:
        rows, columns = weight.shape
        scales = torch.arange(1.0, 1 + -(-rows // BLOCK))[:, None].expand(-1, -(-columns // BLOCK)).contiguous()
        stored[name] = torch.ones(rows, columns).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
save_file(stored, "m/model.safetensors", {"format": "pt"})
fields = json.load(open("m/config.json"))
fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
json.dump(fields, open("m/config.json", "w"))
quantised = FineGrainedFP8Config(dequantize=True, weight_block_size=(BLOCK, BLOCK))
model = AutoModelForCausalLM.from_pretrained("m", quantization_config=quantised, dtype=torch.bfloat16)
weight = model.state_dict()[NAME].float()
print("scales of rows 0, 23, 24, 31, 32, 47:", *(f"{weight[row, 0]:g}" for row in (0, 23, 24, 31, 32, 47)))
assert [float(weight[row, 0]) for row in (23, 24, 31, 32)] == [1, 2, 2, 2], "transformers behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py" "$work"
# Output:
#   scales of rows 0, 23, 24, 31, 32, 47: 1 1 2 2 2 2
