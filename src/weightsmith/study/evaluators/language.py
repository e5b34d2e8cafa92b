"""Causal language models: likelihoods of texts, in batches by length, and greedy or sampled generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from weightsmith.core.errors import NumericError, RecipeError
from weightsmith.observe.model import LoadedModel, TextCoder, resting, text_coder

if TYPE_CHECKING:
    from weightsmith.study.evaluators.subject import Subject

__all__ = ["Language", "Target", "decode", "language"]

_LOOK = 8  # steps of a generation between two looks for its end


@dataclass(frozen=True)
class Target:
    """How likely a model finds a text behind another.

    log_likelihood  sum over the target's tokens, nats;  greedy: how many tokens are the model's first choice
    """

    log_likelihood: float
    tokens: int
    greedy: int
    bytes: int


@dataclass(frozen=True)
class Language:
    """A loaded language model with its tokenizer and the template that prompts stand in."""

    loaded: LoadedModel
    coder: TextCoder
    template: str
    batch: int
    label: str

    # -- prompts

    def prompt(self, text: str) -> str:
        """The prompt in the run's template."""
        if self.template == "plain":
            return text
        if self.template == "chat":
            tokenizer = self.coder.tokenizer
            if tokenizer is None or not getattr(tokenizer, "chat_template", None):
                raise RecipeError(f"template: chat, but {self.label} has no chat template; write plain, or a text")
            turn = [{"role": "user", "content": text}]
            return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        return self.template.replace("{prompt}", text)

    def ids(self, text: str) -> list[int]:
        """The prompt's tokens, with what the model expects first."""
        prefix = () if self.template == "chat" else self.coder.prefix
        return [*prefix, *self.coder.encode(self.prompt(text))]

    def lengths(self, texts: Sequence[str]) -> list[float]:
        """Tokens of every text."""
        return [float(len(self.coder.encode(text))) for text in texts]

    # -- likelihood

    def targets(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[Target], int]:
        """(prompt, target) -> likelihoods, in order, and how many prompts lost their beginning.

        Prompt and target are encoded apart, so that the same target has the same tokens behind every prompt.
        Raises NumericError if a likelihood is no number.
        """
        longest = self.loaded.clip_length(1 << 30)
        encoded = []
        cut = 0
        for prompt, target in pairs:
            before, behind = self.ids(prompt), self.coder.encode(target)
            size = len(target.encode())
            if not before:  # nothing predicts the first token
                before, behind = behind[:1], behind[1:]
                size -= self.coder.bytes_of(before)
            room = longest - len(behind) + 1
            if not behind or room < 1:
                raise RecipeError(f"a target of {len(behind)} tokens: the model has {longest} positions; leave it out")
            cut += len(before) > room
            encoded.append((before[-room:], behind, size))
        order = sorted(range(len(encoded)), key=lambda at: -len(encoded[at][0]) - len(encoded[at][1]))
        found: dict[int, Target] = {}
        with resting(self.loaded.module), torch.no_grad():
            for start in range(0, len(order), self.batch):
                part = order[start : start + self.batch]
                found.update(zip(part, self._scored([encoded[at] for at in part]), strict=True))
        return [found[at] for at in range(len(encoded))], cut

    def _scored(self, part: Sequence[tuple[list[int], list[int], int]]) -> list[Target]:
        """One batch, padded on the right."""
        inputs = [torch.tensor([*before, *behind][:-1]) for before, behind, _ in part]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x, dtype=torch.bool) for x in inputs], True)
        logits = self.loaded.logits(torch.nn.utils.rnn.pad_sequence(inputs, True), None if mask.all() else mask)
        made = []
        for row, (before, behind, size) in zip(logits, part, strict=True):
            answers = row[len(before) - 1 : len(before) - 1 + len(behind)].float()
            wanted = torch.tensor(behind, device=answers.device)
            total = float(answers.log_softmax(-1).gather(1, wanted[:, None]).double().sum())
            if not math.isfinite(total):
                raise NumericError(f"{self.label}: a likelihood is {total}; its weights give NaN or Inf")
            made.append(Target(total, len(behind), int((answers.argmax(-1) == wanted).sum()), size))
        return made

    # -- generation

    def written(
        self,
        prompts: Sequence[str],
        most: int,
        stop: Sequence[str] = (),
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> tuple[list[str], dict[str, float]]:
        """What the model writes behind each prompt, cut at the first stop; greedy, or sampled from a seed.

        notes: prompts that lost their beginning, answers that were cut off by `most`.
        """
        longest = self.loaded.clip_length(1 << 30)
        most = min(most, longest - 1)
        encoded = [self.ids(prompt) for prompt in prompts]
        cut = sum(len(ids) > longest - most for ids in encoded)
        encoded = [ids[-(longest - most) :] for ids in encoded]
        order = sorted(range(len(encoded)), key=lambda at: -len(encoded[at]))
        found: dict[int, str] = {}
        open_ended = 0
        torch.manual_seed(seed)
        with resting(self.loaded.module), torch.no_grad():
            for start in range(0, len(order), self.batch):
                part = order[start : start + self.batch]
                for at, (text, ended) in zip(
                    part, self._continued([encoded[at] for at in part], most, stop, temperature), strict=True
                ):
                    found[at] = text
                    open_ended += not ended
        notes = {"prompts cut": float(cut), "answers cut off": float(open_ended)}
        return [found[at] for at in range(len(encoded))], {name: count for name, count in notes.items() if count}

    def _continued(
        self, part: Sequence[list[int]], most: int, stop: Sequence[str], temperature: float
    ) -> list[tuple[str, bool]]:
        """One batch, padded on the left: (text up to the stop, whether it came to an end)."""
        wide = max(1, *map(len, part))
        device = self.loaded.device
        filler = self._filler()
        ids = torch.tensor([[filler] * (wide - len(row)) + row for row in part], device=device)
        mask = torch.tensor([[0] * (wide - len(row)) + [1] * len(row) for row in part], device=device)
        ends = self._ends()
        how: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": most, "pad_token_id": filler}
        if temperature > 0:
            how |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        if ends:
            how["eos_token_id"] = sorted(ends)
        module: Any = self.loaded.module
        out = module.generate(
            ids,
            attention_mask=mask,
            stopping_criteria=[_Stopped(self.coder, stop, wide, ends)] if stop else None,
            **how,
        )
        return [_ended(self.coder, row[wide:].tolist(), stop, ends) for row in out]

    def _filler(self) -> int:
        names = ("pad_token_id", "eos_token_id", "bos_token_id")
        held = [getattr(self.coder.tokenizer, name, None) for name in names if self.coder.tokenizer is not None]
        return next((one for one in held if isinstance(one, int)), 0)

    def _ends(self) -> frozenset[int]:
        """The tokens that end a text, of the generation settings or the tokenizer."""
        settings = getattr(self.loaded.module, "generation_config", None)
        told = getattr(settings, "eos_token_id", None)
        if told is None:
            told = getattr(self.coder.tokenizer, "eos_token_id", None)
        return frozenset(told if isinstance(told, (list, tuple)) else [] if told is None else [told])


class _Stopped:
    """Ends a generation when every row holds a stop; looked for every few steps, as decoding takes time."""

    def __init__(self, coder: TextCoder, stop: Sequence[str], start: int, ends: frozenset[int]) -> None:
        self.coder, self.stop, self.start, self.ends = coder, stop, start, ends

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        if (ids.shape[1] - self.start) % _LOOK == 0:
            rows = (_ended(self.coder, row, self.stop, self.ends) for row in ids[:, self.start :].tolist())
            done[:] = all(ended for _, ended in rows)
        return done


def _ended(coder: TextCoder, ids: list[int], stop: Sequence[str], ends: frozenset[int]) -> tuple[str, bool]:
    """The text before the first stop or end token, and whether there was one."""
    last = next((at for at, one in enumerate(ids) if one in ends), None)
    text = decode(coder, ids if last is None else ids[:last])
    places = [at for word in stop if (at := text.find(word)) >= 0]
    return (text[: min(places)] if places else text), bool(places) or last is not None


def decode(coder: TextCoder, ids: Sequence[int]) -> str:
    """Text of tokens; what is no UTF-8 becomes U+FFFD."""
    if coder.tokenizer is None:
        return bytes(one for one in ids if 0 <= one < 256).decode(errors="replace")
    return str(coder.tokenizer.decode(list(ids), skip_special_tokens=True))


def language(subject: Subject) -> Language:
    """The subject as a language model."""
    loaded = subject.loaded("causal-lm")
    return Language(loaded, text_coder(loaded), subject.setting.template, subject.setting.batch, subject.label)
