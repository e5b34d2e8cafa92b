"""Text to text with a causal or an encoder-decoder language model: plain, instructed, or behind a soft prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from weightsmith.core.errors import RecipeError
from weightsmith.train.multitask.body import Body, frozen
from weightsmith.train.multitask.data import Answer, Pair, Task, Tasks
from weightsmith.train.multitask.instruct import Mode, render
from weightsmith.train.multitask.prompt import SoftPrompt, deepened, layers_of
from weightsmith.train.multitask.rows import Shared, common, packed, refuse_packing
from weightsmith.train.multitask.system import System

__all__ = ["TextToText"]

_CHUNK = 256  # sequences of one pass over candidates


class TextToText(System):
    """The input is rendered (`instruct.render`), the answer follows and ends with the end token.

    mode      what stands before an input
    examples  of the instruction that are shown
    answer    most tokens of an answer
    prompt    vectors before the input's; they alone train then
    packing   causal models: several examples in one row while training, up to the length of the longest input
    No chat template is applied: base, merged and multi-task models read the same plain text.
    """

    def __init__(
        self,
        body: Body,
        tasks: Tasks,
        mode: Mode,
        examples: int,
        answer: int,
        prompt: SoftPrompt | None = None,
        packing: bool = False,
    ) -> None:
        super().__init__(body, tasks)
        self.mode, self.examples, self.answer, self.packing = mode, examples, answer, packing
        if prompt is not None:
            frozen(body.module)
            self.trains_base = False
            self.own["prompt"] = prompt.to(body.device)
        self.seq2seq = body.loaded.kind == "seq2seq-lm"
        if packing and (self.seq2seq or prompt is not None):
            raise RecipeError("packing: is for causal models that train whole; leave it out")
        if packing:
            refuse_packing(body.module, body.loaded.label)
        for task in tasks.values():
            self._source(task, "")  # the instruction fits
            self._check_answers(task)

    def _prefix(self) -> Tensor | None:
        """The soft prompt [vectors, d], if there is one."""
        return self.own["prompt"]().text if "prompt" in self.own else None

    # -- texts to tokens

    def _limit(self) -> int:
        """Tokens that an input may take."""
        taken = self._vectors + len(self.body.coder.prefix) + len(self.body.coder.suffix)
        if not self.seq2seq:
            room = self.body.loaded.clip_length(self.body.length + self.answer + 1 + taken) - self.answer - 1 - taken
        else:
            room = self.body.loaded.clip_length(self.body.length + taken) - taken
        if room < 1:
            raise RecipeError(
                f"{self.body.loaded.label} has no room for an input beside answers of {self.answer} tokens"
            )
        return min(room, self.body.length)

    def _source(self, task: Task, text: str) -> list[int]:
        coder = self.body.coder
        shown = render(
            task.instruction, text, limit=self._limit(), length=lambda t: len(coder.encode(t)),
            mode=self.mode, examples=self.examples, task=task.name,
        )  # fmt: skip
        return [*coder.prefix, *coder.encode(shown), *(coder.suffix if self.seq2seq else ())]

    def _check_answers(self, task: Task) -> None:
        """Note answers that are cut; RecipeError for candidates that are then alike."""
        whole = [len(self.body.coder.encode(f" {task.text(pair.answer)}")) for pair in task.parts.get("train", ())]
        if long := sum(count > self.answer for count in whole):
            self.notes.append(f"{task.name}: {long} of {len(whole)} answers are cut to {self.answer} tokens")
        ends = [tuple(self._target(name)) for name in task.spec.candidates or ()]
        if len(set(ends)) < len(ends):
            raise RecipeError(
                f"task {task.name!r}: some candidates are alike in their first {self.answer} tokens; raise answer"
            )

    def _target(self, text: str) -> list[int]:
        ids = self.body.coder.encode(text if self.seq2seq else f" {text}")
        return [*ids[: self.answer], self.body.end]

    # -- the model

    def _embedded(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """The model's inputs of token rows, behind the soft prompt if there is one."""
        ids, mask = _padded(rows, self.body.device)
        if (prefix := self._prefix()) is None:
            return {"input_ids": ids, "attention_mask": mask}
        vectors = self.body.module.get_input_embeddings()(ids)
        before = prefix.to(vectors.dtype).expand(len(rows), -1, -1)
        ones = torch.ones(len(rows), len(prefix), dtype=mask.dtype, device=mask.device)
        return {"inputs_embeds": torch.cat([before, vectors], 1), "attention_mask": torch.cat([ones, mask], 1)}

    def _deep(self) -> AbstractContextManager[None]:
        """While it lasts, later layers read the soft prompt's own vectors for them, if there are some."""
        deep = self.own["prompt"]().text_deep if "prompt" in self.own else None
        return deepened(layers_of(self.body.module) if deep is not None else (), deep, slice(0, self._vectors))

    @property
    def _vectors(self) -> int:
        prefix = self._prefix()
        return 0 if prefix is None else len(prefix)

    @torch.no_grad()
    def _shared(self, sources: Sequence[list[int]]) -> Shared | None:
        """What all sources begin with, run once; None of an encoder-decoder model, or where there is nothing."""
        count = 0 if self.seq2seq else common(sources)
        if not count:
            return None
        with self._deep():
            found = self.body.module(**self._embedded([sources[0][:count]]), use_cache=True)
        cache = getattr(found, "past_key_values", None)
        return None if cache is None else Shared(cache, count, count + self._vectors)

    def _logits(self, rows: Sequence[list[int]], shared: Shared | None) -> Tensor:
        """Of a causal model [batch, longest - skip, vocabulary] on the tokens of rows behind the shared ones."""
        module = self.body.module
        if shared is not None:
            ids, mask = _padded([row[shared.skip :] for row in rows], self.body.device)
            found: Tensor = module(input_ids=ids, **shared.options(mask), use_cache=True).logits
            return found
        if self.packing and torch.is_grad_enabled():
            made = packed(rows, self.body.length + self.answer)
            at = self.body.device
            given = {"attention_mask": made.mask.to(at, module.dtype), "position_ids": made.positions.to(at)}
            return made.unpacked(module(made.ids.to(at), **given, use_cache=False).logits, [*map(len, rows)])
        with self._deep():
            logits: Tensor = module(**self._embedded(rows), use_cache=False).logits
        return logits[:, self._vectors :]

    def _costs(
        self, sources: Sequence[list[int]], targets: Sequence[list[int]], shared: Shared | None = None
    ) -> Tensor:
        """-log P of every token of the targets [batch, tokens], 0 elsewhere: the inputs' tokens do not count."""
        if self.seq2seq:
            labels = _labels([[]] * len(targets), targets, self.body.device)
            with self._deep():
                logits = self.body.module(**self._embedded(sources), labels=labels).logits
        else:
            labels = _labels(sources, targets, self.body.device)[:, shared.skip if shared else 0 :]
            logits = self._logits([[*a, *b] for a, b in zip(sources, targets, strict=True)], shared)
            logits, labels = logits[:, :-1], labels[:, 1:]
        return cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=-100)

    def loss(self, task: Task, pairs: Sequence[Pair]) -> tuple[Tensor, int]:
        targets = [self._target(task.text(pair.answer)) for pair in pairs]
        costs = self._costs([self._source(task, str(pair.input)) for pair in pairs], targets)
        return costs.sum(), sum(map(len, targets))

    # -- answers

    @torch.no_grad()
    def predict(self, task: Task, pairs: Sequence[Pair]) -> list[Answer]:
        """The likeliest candidate, its end token included (one may begin like another); else greedy decoding.

        What all inputs begin with, an instruction for one, runs through a causal model once.
        """
        sources = [self._source(task, str(pair.input)) for pair in pairs]
        shared = self._shared(sources)
        if task.kind == "label":
            names = task.spec.candidates or tuple(map(str, range(task.classes)))
            both = [(source, self._target(name)) for source in sources for name in names]
            chunks = [both[i : i + _CHUNK] for i in range(0, len(both), _CHUNK)]
            costs = torch.cat([self._costs([a for a, _ in c], [b for _, b in c], shared).sum(1) for c in chunks])
            return list(costs.view(len(sources), len(names)).argmin(1).tolist())
        coder = self.body.coder
        return [_text(coder, ids) for ids in self._greedy(sources, shared)]

    @torch.no_grad()
    def _greedy(self, sources: Sequence[list[int]], shared: Shared | None = None) -> list[list[int]]:
        written: list[list[int]] = [[] for _ in sources]
        open_ = set(range(len(sources)))
        module = self.body.module
        encoded: Any = None
        if self.seq2seq:
            given = self._embedded(sources)
            with self._deep():
                encoded = module.get_encoder()(**given)
            start = module.config.decoder_start_token_id
        for _ in range(self.answer):
            if self.seq2seq:
                ids = torch.tensor([[start, *row] for row in written], device=self.body.device)
                logits = module(
                    encoder_outputs=encoded, attention_mask=given["attention_mask"], decoder_input_ids=ids
                ).logits[:, -1]
            else:
                rows = [[*a, *b] for a, b in zip(sources, written, strict=True)]
                found = self._logits(rows, shared)
                last = torch.tensor([len(row) - 1 for row in rows], device=found.device)
                logits = found[torch.arange(len(rows), device=found.device), last - (shared.skip if shared else 0)]
            for i, token in enumerate(logits.argmax(-1).tolist()):
                written[i].append(token)
                if token == self.body.end:
                    open_.discard(i)
            if not open_:
                break
        return [row[: row.index(self.body.end)] if self.body.end in row else row for row in written]


def _text(coder: Any, ids: list[int]) -> str:
    if coder.tokenizer is None:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace").strip()
    return str(coder.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    ids = pad_sequence([torch.tensor(row) for row in rows], True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in rows], True)
    return ids.to(device), mask.to(device)


def _labels(sources: Sequence[list[int]], targets: Sequence[list[int]], device: torch.device) -> Tensor:
    """Tokens of the targets behind -100 for those of the sources [batch, longest]."""
    rows = [torch.tensor([*[-100] * len(a), *b]) for a, b in zip(sources, targets, strict=True)]
    return pad_sequence(rows, True, padding_value=-100).to(device)
