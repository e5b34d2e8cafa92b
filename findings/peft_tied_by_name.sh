#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0: `ensure_weight_tying` holds for embeddings called embed_tokens only.
#
# Expected: LoraConfig(ensure_weight_tying=True) trains one change for a tied embedding and output layer, whatever the
#   embedding is called (wte, word_embeddings), and a saved adapter computes after loading what it computed before.
# Seen: with target_modules ["wte"] nothing is tied, without a word.  With ["wte", "lm_head"] the two are tied in training;
#   the saved config names "wte" alone, so that loading ties nothing and drops the output layer's factors.
# For a merge: the file of the second adapter holds both changes, and its live reload is not what was trained.
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
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

TOKENS = torch.arange(2, 12)[None]


def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def logits(found):
    with torch.no_grad():
        return found(input_ids=TOKENS).logits


for named in (["wte"], ["wte", "lm_head"]):
    config = LoraConfig(r=4, target_modules=["c_attn", *named], ensure_weight_tying=True, init_lora_weights=False)
    tuned = get_peft_model(model(), config).eval()
    trained = logits(tuned)
    tuned.save_pretrained(sys.argv[1])
    head = sum("lm_head.lora" in name for name in load_file(f"{sys.argv[1]}/adapter_model.safetensors"))
    again = logits(PeftModel.from_pretrained(model(), sys.argv[1]).eval())
    gap = float((again - trained).abs().max())
    print(f"{named}: {head} tensors of the output layer are saved; after loading logits are off by {gap:.1f}")
    assert (head, gap > 1) == ((0, False) if named == ["wte"] else (2, True)), "peft behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py" "$work/adapter"
# Output:
#   ['wte']: 0 tensors of the output layer are saved; after loading logits are off by 0.0
#   ['wte', 'lm_head']: 2 tensors of the output layer are saved; after loading logits are off by 204.3
