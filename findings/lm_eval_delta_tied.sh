#!/usr/bin/env bash
# lm-eval 0.4.13, transformers 5.23.0: `--model_args pretrained=BASE,delta=DELTA` on a model with tied embeddings.
#
# Expected: what is scored is base + delta, as the option says ("delta weights to apply to the base model").
# Seen: it adds over `state_dict()`, which names a tied embedding twice (embed_tokens and lm_head), in place both times:
#   the embedding becomes base + 2 delta, all else base + delta.  Nothing is said.  Untied models are right.
# For a merge: a task vector given as `delta` to a tied model (most small ones) is scored as a model that nobody has.
#   Add it first and score the sum.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
pip() { "$work/env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip lm-eval==0.4.13 transformers==5.23.0 accelerate peft==0.21.2
cat > "$work/run.py" <<'PY'
import os
import sys

os.chdir(sys.argv[1])
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2}, unk_token="<unk>")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<s>", bos_token="<s>")
sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
LAYERS = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
for tied in (True, False):
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
    base, delta = LlamaForCausalLM(config), LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.fill_(0.25)
    for name, model in (("base", base), ("delta", delta)):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    scored = HFLM(pretrained="base", delta="delta", device="cpu", dtype="float32").model
    moved = [float((scored.state_dict()[n] - base.state_dict()[n]).mean()) / 0.25 for n in LAYERS]
    print("tied:" if tied else "untied:", *(f"{n} + {times:.2f} delta," for n, times in zip(LAYERS, moved)))
    wanted = [2, 2, 1] if tied else [1, 1, 1]
    assert all(abs(times - w) < 1e-4 for times, w in zip(moved, wanted)), "lm-eval behaves differently now"
PY
"$work/env/bin/python" -W ignore "$work/run.py" "$work" 2> "$work/log" || { cat "$work/log"; exit 1; }
# Output:
#   tied: model.embed_tokens.weight + 2.00 delta, lm_head.weight + 2.00 delta, model.norm.weight + 1.00 delta,
#   untied: model.embed_tokens.weight + 1.00 delta, lm_head.weight + 1.00 delta, model.norm.weight + 1.00 delta,
