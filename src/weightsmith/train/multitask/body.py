"""The model that all tasks share, behind one face: texts or images in, hidden states or features out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from weightsmith.core.errors import MissingExtra, RecipeError
from weightsmith.observe.kinds import KINDS
from weightsmith.observe.model import LoadedModel, TextCoder, text_coder
from weightsmith.train.multitask.data import Task, Tasks

__all__ = ["Body", "Hidden"]


@dataclass(frozen=True, eq=False)
class Hidden:
    """levels: hidden states [batch, tokens, d] from early to late; mask [batch, tokens]: False at padding."""

    levels: Sequence[Tensor]
    mask: Tensor | None = None
    grid: tuple[int, int] | None = None
    """Height and width, where the tokens are pixels."""

    def pooled(self) -> Tensor:
        """The mean of the last level's tokens [batch, d]."""
        last = self.levels[-1]
        if self.mask is None:
            return last.mean(1)
        kept = self.mask.unsqueeze(-1).to(last.dtype)
        return (last * kept).sum(1) / kept.sum(1)


@dataclass(frozen=True, eq=False)
class Body:
    """A loaded model (transformers, or a module that takes images) and how long its texts may be."""

    loaded: LoadedModel
    length: int

    @property
    def module(self) -> Any:
        return self.loaded.module

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @cached_property
    def coder(self) -> TextCoder:
        return text_coder(self.loaded)

    @property
    def reads(self) -> str:
        return "image" if self.loaded.config is None else KINDS[self.loaded.kind].reads

    @cached_property
    def end(self) -> int:
        """The token that ends an answer: the tokenizer's end of text, a line break where it has none."""
        found = getattr(self.coder.tokenizer, "eos_token_id", None)
        return found if isinstance(found, int) else self.coder.encode("\n")[-1]

    # -- inputs

    def prepared(self, tasks: Tasks) -> dict[str, Task]:
        """The tasks with images as the model takes them; RecipeError for tasks that it cannot read."""
        for task in tasks.values():
            pair = next(pair for part in task.parts.values() for pair in part)
            given = "text" if isinstance(pair.input, str) else "image"
            if given not in self.reads:
                raise RecipeError(
                    f"task {task.name!r} has {given}s, but {self.loaded.label} ({self.loaded.kind}) reads {self.reads}"
                )
        return {name: self._processed(task) for name, task in tasks.items()}

    def _processed(self, task: Task) -> Task:
        folder, size = (
            self.loaded.folder,
            getattr(getattr(self.loaded.config, "vision_config", self.loaded.config), "image_size", None),
        )
        if not isinstance(next(pair for part in task.parts.values() for pair in part).input, Tensor):
            return task
        if folder is not None and (folder / "preprocessor_config.json").exists():
            change = _processor(folder)
            parts = {
                part: [replace(pair, input=change(pair.input)) for pair in own] for part, own in task.parts.items()
            }
            return replace(task, parts=parts)
        for pair in (pair for part in task.parts.values() for pair in part):
            assert isinstance(pair.input, Tensor)
            if isinstance(size, int) and tuple(pair.input.shape[-2:]) != (size, size):
                shape = tuple(pair.input.shape[-2:])
                raise RecipeError(
                    f"task {task.name!r}: an image of {shape} pixels for a model of {size} x {size}; "
                    "resize it, or put the model's preprocessor_config.json into its folder"
                )
        return task

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [batch, longest]; CLIP's texts end with its end token."""
        limit = self.loaded.clip_length(self.length)
        rows = [self.coder.example(text, limit) for text in texts]
        if self.loaded.kind == "image-text" and self.coder.tokenizer is None:
            rows = [[*row[: limit - 1], int(self.loaded.text_config.eos_token_id)] for row in rows]
        rows = [row or [self.end] for row in rows]
        ids = pad_sequence([torch.tensor(row) for row in rows], True)
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], True)
        return ids.to(self.device), mask.to(self.device)

    def spare(self, text: str) -> int:
        """Tokens that the model has left beside a text; below 0 where `tokens` would cut it."""
        ends = self.loaded.kind == "image-text" and self.coder.tokenizer is None
        whole = [*self.coder.prefix, *self.coder.encode(text), *self.coder.suffix, *([None] if ends else [])]
        return self.loaded.clip_length(self.length) - len(whole)

    def images(self, inputs: Sequence[Any]) -> Tensor:
        if len({tuple(x.shape) for x in inputs}) > 1:
            raise RecipeError("images of one task have different sizes; resize or crop them to one")
        return torch.stack(list(inputs)).to(self.device)

    # -- outputs

    def hidden(self, inputs: Sequence[Any]) -> Hidden:
        """Hidden states of texts or images."""
        text = isinstance(inputs[0], str)
        if self.loaded.config is None:
            return self._maps(self.images(inputs))
        ids, mask = self.tokens(inputs) if text else (self.images(inputs), None)
        found = self.tower(text)(**_arguments(ids, mask), output_hidden_states=True)
        levels = getattr(found, "hidden_states", None) or found.encoder_hidden_states
        levels = [x.flatten(2).transpose(1, 2) if x.ndim == 4 else x for x in levels[1:]]
        return Hidden(levels, mask)

    def _maps(self, images: Tensor) -> Hidden:
        levels = self.module.levels(images) if hasattr(self.module, "levels") else [self.module(images)]
        if levels[-1].ndim == 4:
            grid = tuple(levels[-1].shape[-2:])
            return Hidden([x.flatten(2).transpose(1, 2) for x in levels], None, (grid[0], grid[1]))
        return Hidden([x.unsqueeze(1) if x.ndim == 2 else x for x in levels])

    def tower(self, text: bool) -> Any:
        """The part that reads texts, or images."""
        if self.loaded.kind == "image-text":
            return self.module.text_model if text else self.module.vision_model
        return self.module.get_encoder() if getattr(self.loaded.config, "is_encoder_decoder", False) else self.module

    def features(self, inputs: Sequence[Any]) -> Tensor:
        """One vector [batch, d] of each input: CLIP's own, the last token's of a language model, else a mean."""
        if self.loaded.kind == "image-text":
            text = isinstance(inputs[0], str)
            ids, mask = self.tokens(inputs) if text else (self.images(inputs), None)
            vectors: Tensor = self.loaded.run(ids, mask)
            return vectors
        found = self.hidden(inputs)
        if self.loaded.kind == "causal-lm" and found.mask is not None:
            return found.levels[-1][torch.arange(len(inputs), device=self.device), found.mask.sum(1) - 1]
        return found.pooled()

    def probe(self, task: Task) -> Hidden:
        """Hidden states of one example, for their shapes."""
        with torch.no_grad():
            return self.hidden([next(pair for part in task.parts.values() for pair in part).input])


def _arguments(inputs: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    return {"pixel_values": inputs} if mask is None else {"input_ids": inputs, "attention_mask": mask.long()}


def _processor(folder: Any) -> Any:
    try:
        from transformers import AutoImageProcessor

        made = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError:
        raise MissingExtra("transformers", "models", "reading images for a model of transformers") from None

    def change(image: Tensor) -> Tensor:
        pixels = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        found: Tensor = made(images=[pixels], return_tensors="pt")["pixel_values"][0]
        return found

    return change


def frozen(module: nn.Module) -> None:
    """No parameter trains."""
    module.requires_grad_(False)
