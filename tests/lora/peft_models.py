"""Tiny models with trained adapters, saved by peft, and what peft makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from peft.tuners.lora import LoraLayer
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

Maker = Callable[[], torch.nn.Module]
TOKENS = torch.arange(1, 13).reshape(2, 6)


def llama(seed: int = 0, **more: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **more})).eval()


def gpt2(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """peft warns of what is meant here (densities of 1, tied embeddings, several adapters)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapter(folder: Path, make: Maker, seed: int, **config: Any) -> Path:
    """Save an adapter whose every factor is random."""
    with quiet():
        wrapped = peft.get_peft_model(make(), peft.LoraConfig(**config))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
        wrapped.save_pretrained(folder)
    return folder


def loaded(make: Maker, folders: dict[str, Path]) -> peft.PeftModel:
    """A fresh model with the adapters in it."""
    with quiet():
        (first, folder), *others = folders.items()
        model = peft.PeftModel.from_pretrained(make(), folder, adapter_name=first)
        for name, path in others:
            model.load_adapter(path, adapter_name=name)
    return model.eval()


def deltas(model: peft.PeftModel, name: str) -> dict[str, Tensor]:
    """What an adapter adds to each weight."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    has = {n: m for n, m in layers.items() if name in m.lora_A or name in m.lora_embedding_A}
    return {n: m.get_delta_weight(name).detach() for n, m in has.items()}


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits
