#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: LoRA on torch's nn.MultiheadAttention counts the change of `out_proj` twice.
#
# Expected: targeting the attention adapts both of its matrices, and each gets its change once:
#   in_proj_weight + s B A, out_proj.weight + s B A.
# Seen: in_proj_weight gets its change once; out_proj.weight gets 2 s B A, in the running model and after
#   merge_and_unload() alike (they agree to the last bit, so that no comparison of the two shows it).  Targeting
#   `out_proj` alone merges the change once, and has no effect in the running model.
# For a merge: whoever adds s B A to out_proj, as for any other layer, gets a model that was never trained.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip peft==0.21.2 transformers==5.23.0
cat > "$work/run.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

SCALE = 2.0  # lora_alpha / r


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def plain(weights):
    model = Model().eval()
    model.load_state_dict(weights)
    return model


torch.manual_seed(0)
model = Model().eval()
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
config = LoraConfig(r=2, lora_alpha=4, target_modules=["attn"], init_lora_weights=False)
tuned = get_peft_model(model, config).eval()
factors = {name: tensor.clone() for name, tensor in tuned.state_dict().items() if "lora_" in name}


def change(where):
    down, up = (factors[f"base_model.model.{where}.lora_{letter}.default.weight"] for letter in "AB")
    return SCALE * up @ down


incoming, outgoing = change("attn"), change("attn.base_layer.out_proj")
x = torch.randn(3, 5, 8)
with torch.no_grad():
    running = tuned(x)
    for times in (0, 1, 2):
        weights = dict(base)
        weights["attn.in_proj_weight"] = base["attn.in_proj_weight"] + incoming
        weights["attn.out_proj.weight"] = base["attn.out_proj.weight"] + times * outgoing
        off = float((plain(weights)(x) - running).abs().max())
        print(f"out_proj changed {times} times: outputs differ from the running model by {off:.1e}")
        assert (off < 1e-5) == (times == 2), "peft behaves differently now"
    merged = tuned.merge_and_unload()
    difference = merged.state_dict()["attn.out_proj.weight"] - base["attn.out_proj.weight"]
    ratio = float((difference * outgoing).sum() / (outgoing * outgoing).sum())
    print(f"merged: out_proj moved by {ratio:.3f} times its change; equal to running: {torch.equal(merged(x), running)}")
    assert abs(ratio - 2) < 1e-5, "peft behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py"
# Output:
#   out_proj changed 0 times: outputs differ from the running model by 2.0e+00
#   out_proj changed 1 times: outputs differ from the running model by 9.8e-01
#   out_proj changed 2 times: outputs differ from the running model by 2.4e-07
#   merged: out_proj moved by 2.000 times its change; equal to running: True
