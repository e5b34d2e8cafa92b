#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0: `unload()` of an adapter with `modules_to_save`.
#
# Expected: unload() gives the base model back ("Return the base model by removing all the PEFT modules"), as
#   disable_adapter() does, which puts the base's own module in place.
# Seen: LoRA layers are the base's again, but each module of `modules_to_save` (a head, an embedding) stays the trained
#   one, and the base's is dropped.  Without a word; merge_and_unload() and unload() give the same head.
# For a merge: a task vector as merge_and_unload() minus unload() has nothing of the head, and the "base" of the next
#   adapter, or of a score without it, is a model that was never the base.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip peft==0.21.2 transformers==5.23.0
cat > "$work/run.py" <<'PY'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = torch.arange(2, 12)[None]


def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


def logits(found):
    with torch.no_grad():
        return found(input_ids=TOKENS).logits


config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
tuned = get_peft_model(model(), config)
with torch.no_grad():
    tuned.get_output_embeddings().weight.add_(1)
tuned.save_pretrained(sys.argv[1])

base = model()
loaded = PeftModel.from_pretrained(model(), sys.argv[1]).eval()
with loaded.disable_adapter():
    disabled = torch.equal(logits(loaded), logits(base))
unloaded = loaded.unload()
differs = [name for name, tensor in base.state_dict().items() if not torch.equal(unloaded.state_dict()[name], tensor)]
moved = float((unloaded.lm_head.weight - base.lm_head.weight).mean())
merged = PeftModel.from_pretrained(model(), sys.argv[1]).merge_and_unload()
print(f"disable_adapter() computes what the base does: {disabled}")
print(f"unload() differs from the base in {differs}, by {moved:.2f}")
print(f"its head is that of merge_and_unload(): {torch.equal(unloaded.lm_head.weight, merged.lm_head.weight)}")
assert disabled and differs == ["lm_head.weight"], "peft behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py" "$work/adapter"
# Output:
#   disable_adapter() computes what the base does: True
#   unload() differs from the base in ['lm_head.weight'], by 1.00
#   its head is that of merge_and_unload(): True
