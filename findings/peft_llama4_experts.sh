#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0: LoRA on the fused experts of Llama 4 (`target_parameters`).
#
# Expected: GPT-OSS and Llama 4 both store experts [experts, inputs, outputs]; so `lora_A` takes the inputs and `lora_B`
#   gives the outputs in both.
# Seen: peft asks the module for `is_transposed`, which GPT-OSS's experts have and Llama 4's have not.  For Llama 4 the
#   factors are the other way round: `lora_A` [experts * r, outputs], `lora_B` [inputs, r * experts], and the change is
#   B A as it is, not its transpose.  It trains and merges all right, as long as peft itself does both.
# For a merge: the layout of the weights does not tell the orientation of the factors; for square experts
#   (`down_proj` with intermediate_size == hidden_size) nothing in the files does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip peft==0.21.2 transformers==5.23.0
cat > "$work/run.py" <<'PY'
from peft import LoraConfig, get_peft_model
from transformers import GptOssConfig, GptOssForCausalLM, Llama4ForCausalLM, Llama4TextConfig

HIDDEN, INNER, EXPERTS, RANK = 32, 12, 2, 3
sizes = dict(vocab_size=64, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=2, head_dim=16, num_local_experts=EXPERTS, num_experts_per_tok=1)
models = {
    "GPT-OSS": GptOssForCausalLM(GptOssConfig(**sizes)),
    "Llama 4": Llama4ForCausalLM(Llama4TextConfig(**sizes, intermediate_size_mlp=INNER, interleave_moe_layer_step=1)),
}
seen = {}
for name, model in models.items():
    stored = next(tuple(p.shape) for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj"))
    tuned = get_peft_model(model, LoraConfig(r=RANK, target_parameters=["experts.gate_up_proj"]))
    a, b = (
        next(tuple(p.shape) for n, p in tuned.named_parameters() if f"experts.lora_{side}" in n) for side in "AB"
    )
    print(f"{name}: gate_up_proj {stored}, lora_A {a}, lora_B {b}")
    assert stored == (EXPERTS, HIDDEN, 2 * INNER)
    seen[name] = (a[1], b[0])
assert seen == {"GPT-OSS": (HIDDEN, 2 * INNER), "Llama 4": (2 * INNER, HIDDEN)}, "peft behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py"
# Output:
#   GPT-OSS: gate_up_proj (2, 32, 24), lora_A (6, 32), lora_B (24, 6)
#   Llama 4: gate_up_proj (2, 32, 24), lora_A (6, 24), lora_B (32, 6)
