#!/usr/bin/env bash
# transformers 5.24.0: a sharded model whose index takes a tensor from one shard, while another shard holds it too.
#
# Expected: the index decides (`weight_map`: tensor -> file), as its name and the refusal of missing shards suggest.
# Seen: the index only says which files are read.  All tensors of all of them are taken, one over the other in the order
#   of the files' names: an overlay `z-overlay.safetensors` counts, the same file called `a-overlay.safetensors` is
#   overwritten by the old values of `model-00001-of-00001.safetensors`, without a word.
# For a merge: a folder with an overlay means two models, by the name of a file.  Read the tensor from the shard that the
#   index names where that is the last one by name, and refuse where the two rules disagree.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.24.0
cat > "$work/run.py" <<'PY'
import json
import os
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

os.chdir(sys.argv[1])
NAME, SHARD = "model.norm.weight", "model-00001-of-00001.safetensors"
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(config).save_pretrained("m")
tensors = load_file("m/model.safetensors")
os.remove("m/model.safetensors")
seen = {}
for overlay in ("z-overlay.safetensors", "a-overlay.safetensors"):
    save_file(tensors, f"m/{SHARD}", {"format": "pt"})
    save_file({NAME: tensors[NAME] + 1}, f"m/{overlay}", {"format": "pt"})
    index = {name: overlay if name == NAME else SHARD for name in tensors}
    with open("m/model.safetensors.index.json", "w") as file:
        json.dump({"metadata": {}, "weight_map": index}, file)
    loaded = AutoModelForCausalLM.from_pretrained("m").state_dict()[NAME]
    seen[overlay] = "the overlay" if torch.equal(loaded, tensors[NAME] + 1) else "the old shard"
    print(f"{overlay}: the index names it for {NAME}; loaded from {seen[overlay]}")
    os.remove(f"m/{overlay}")
assert list(seen.values()) == ["the overlay", "the old shard"], "transformers behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py" "$work"
# Output:
#   z-overlay.safetensors: the index names it for model.norm.weight; loaded from the overlay
#   a-overlay.safetensors: the index names it for model.norm.weight; loaded from the old shard
