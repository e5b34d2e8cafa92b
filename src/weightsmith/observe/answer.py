"""What a language model says to a prompt: its likeliest token, again and again."""

from __future__ import annotations

from typing import Any

import torch

from weightsmith.core.errors import SourceError, WeightsmithError
from weightsmith.observe.model import LoadedModel, resting, text_coder

__all__ = ["answer"]


def answer(loaded: LoadedModel, prompt: str, tokens: int = 64, chat: bool = False) -> str:
    """The text after a prompt: greedy, so the same every time; at most `tokens` tokens, or to the model's end token.

    chat  put the prompt into the tokenizer's chat template, as the message of a user
    Nothing of the folder's generation_config.json counts but its end tokens.
    Raises SourceError for what is not a causal language model, or has no tokenizer (or template).
    """
    if loaded.kind != "causal-lm":
        raise SourceError(f"{loaded.label}: a model for {loaded.kind}, which does not continue a text")
    coder = text_coder(loaded)
    ids = _message(loaded, coder.tokenizer, prompt) if chat else [*coder.prefix, *coder.encode(prompt)]
    if not ids:
        raise WeightsmithError("--prompt has no token; write a few words")
    room = loaded.clip_length(len(ids) + tokens) - len(ids)
    if room < 1:
        raise WeightsmithError(f"--prompt has {len(ids)} tokens, {loaded.label} room for fewer; write a shorter one")
    with resting(loaded.module), torch.no_grad():
        made = _greedy(loaded, ids, room)
    if coder.tokenizer is None:
        return bytes(made).decode(errors="replace")
    return str(coder.tokenizer.decode(made, skip_special_tokens=True))


def _message(loaded: LoadedModel, tokenizer: Any, prompt: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise SourceError(f"{loaded.label}: its tokenizer has no chat template; leave --chat out")
    message = [{"role": "user", "content": prompt}]
    given = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)
    return [int(one) for one in given["input_ids"]]


def _greedy(loaded: LoadedModel, ids: list[int], most: int) -> list[int]:
    """The likeliest tokens, with the keys and values of earlier ones kept where the model can."""
    module: Any = loaded.module
    keeps = hasattr(module, "generate")  # others, as those of a tangent space, have no cache
    ends, made, past = _ends(module), list[int](), None
    step = torch.tensor([ids])
    while True:
        if keeps:
            out = module(input_ids=step.to(loaded.device), past_key_values=past, use_cache=True)
            logits, past = out.logits, getattr(out, "past_key_values", None)
        else:
            logits = loaded.logits(step)
        last = logits[0, -1].float()
        if not bool(torch.isfinite(last).all()):
            raise SourceError(f"{loaded.label}: NaN or Inf in the logits")
        token = int(last.argmax())
        if token in ends:
            return made
        made.append(token)
        if len(made) == most:
            return made
        step = torch.tensor([[token] if past is not None else [*ids, *made]])


def _ends(module: Any) -> set[int]:
    """Tokens that end an answer."""
    found: Any = None
    for name in ("generation_config", "config"):
        found = getattr(getattr(module, name, None), "eos_token_id", None) if found is None else found
    return {int(one) for one in (found if isinstance(found, (list, tuple)) else [found]) if isinstance(one, int)}
