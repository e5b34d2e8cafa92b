"""Soft prompts on CLIP: class names as texts with a context, images with vectors beside their patches (MVLPT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pad_sequence

from weightsmith.core.errors import RecipeError
from weightsmith.train.multitask.body import Body, frozen
from weightsmith.train.multitask.data import Answer, Pair, Task, Tasks
from weightsmith.train.multitask.prompt import SoftPrompt, after_class_token, deepened, inserted, placed
from weightsmith.train.multitask.system import System

__all__ = ["PromptedClip"]


class PromptedClip(System):
    """exp(s) cos(image, class text) over a task's own classes; the prompt alone trains."""

    trains_base = False

    def __init__(self, body: Body, tasks: Tasks, prompt: SoftPrompt, position: str) -> None:
        super().__init__(body, tasks)
        self.position, self.n = position, 0 if prompt.kind == "visual" else prompt.n_ctx
        frozen(body.module)
        self.own["prompt"] = prompt.to(body.device)
        for task in tasks.values():
            if task.kind != "label" or task.spec.candidates is None:
                raise RecipeError(
                    f"task {task.name!r} needs labels and candidates: prompts of CLIP stand before class names"
                )
            self._rows(task)

    def _rows(self, task: Task) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of the class texts, their mask, and where the prompt's vectors go [classes, tokens]."""
        coder, config = self.body.coder, self.body.loaded.text_config
        end = [int(config.eos_token_id)] if coder.tokenizer is None else []
        stand_in = 0 if config.eos_token_id != 0 else 1
        limit = int(config.max_position_embeddings)
        rows, spots = [], []
        for name in task.spec.candidates or ():
            ids, where = placed(coder.encode(name), self.n, self.position, stand_in)
            row = [*coder.prefix, *ids, *coder.suffix, *end]
            if len(row) > limit:
                raise RecipeError(
                    f"task {task.name!r}: class {name!r} and {self.n} vectors take {len(row)} tokens of {limit}; "
                    "shorten the name, or lower n_ctx"
                )
            rows.append(torch.tensor(row))
            spot = torch.zeros(len(row), dtype=torch.bool)
            spot[[len(coder.prefix) + w for w in where]] = True
            spots.append(spot)
        device = self.body.device
        mask = pad_sequence([torch.ones_like(row) for row in rows], True)
        return pad_sequence(rows, True).to(device), mask.to(device), pad_sequence(spots, True).to(device)

    def logits(self, task: Task, pairs: Sequence[Pair]) -> Tensor:
        """[batch, classes of the task]."""
        module: Any = self.body.module
        prompt: Any = self.own["prompt"]
        context = prompt()
        ids, mask, spots = self._rows(task)
        vectors = context.text if context.text is not None else torch.zeros(0, device=ids.device)
        embedding, layers = module.text_model.embeddings.token_embedding, module.text_model.encoder.layers
        with (
            inserted(embedding, spots, vectors.reshape(-1, _width(module))),
            deepened(layers, context.text_deep, spots),
        ):
            texts = _tensor(module.get_text_features(input_ids=ids, attention_mask=mask))
        layers, places = module.vision_model.encoder.layers, slice(1, 1 + prompt.n_ctx)
        with after_class_token(layers[0], context.visual), deepened(layers, context.visual_deep, places):
            images = _tensor(module.get_image_features(pixel_values=self.body.images([p.input for p in pairs])))
        scale: Tensor = module.logit_scale.exp()
        return scale * normalize(images, dim=-1) @ normalize(texts, dim=-1).T

    def loss(self, task: Task, pairs: Sequence[Pair]) -> tuple[Tensor, int]:
        labels = torch.tensor([pair.answer for pair in pairs], device=self.body.device)
        return cross_entropy(self.logits(task, pairs).float(), labels, reduction="sum"), len(pairs)

    def predict(self, task: Task, pairs: Sequence[Pair]) -> list[Answer]:
        return list(self.logits(task, pairs).argmax(-1).tolist())


def _width(module: Any) -> int:
    return int(module.text_model.embeddings.token_embedding.weight.shape[1])


def _tensor(out: Any) -> Tensor:
    """What a tower gives: a tensor, or since transformers 5 an output that holds it."""
    found: Tensor = getattr(out, "pooler_output", out)
    return found
