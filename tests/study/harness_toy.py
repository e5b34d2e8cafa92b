"""A tiny language model with a tokenizer of its own, a task of lm_eval, and pairs for mteb."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightsmith.study.evaluators.subject import Setting, Subject

CHOICES = [
    {"question": f"{a}+{b}=", "choices": [str(a + b), str(a + b + 1), str(a + b + 2)], "answer": 0}
    for a in range(3)
    for b in range(4)
]

TASK = """
task: own_sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def language_model(folder: Path, seed: int = 0, tokenizer: bool = True) -> Path:
    """A random Llama of 256 tokens: bytes, with a tokenizer that says so or without one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    if tokenizer:
        bytewise(folder)
    return folder


def bytewise(folder: Path) -> None:
    """A tokenizer whose tokens are the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    made = Tokenizer(models.BPE({letter: at for at, letter in enumerate(sorted(letters))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    first = sorted(letters)[0]
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token=first, eos_token=first).save_pretrained(folder)


def own_task(folder: Path) -> Path:
    """A folder with one task of lm_eval; returns its data."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in CHOICES))
    (folder / "own_sums.yaml").write_text(TASK.replace("FILE", str(data)))
    return data


def subject(folder: Path, **more: Any) -> Subject:
    """A folder's model on the CPU; `more` of the setting."""
    return Subject("tiny", folder, Setting(device="cpu", **more))


def lines(file: Path, items: Sequence[Any]) -> str:
    """Write JSON lines; returns the path."""
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(file)
