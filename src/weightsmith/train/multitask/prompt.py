"""Soft prompts of text, image, or both, shared by tasks and adapted to others (MVLPT, arXiv 2211.11720)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from weightsmith.core.errors import RecipeError

__all__ = ["Contexts", "SoftPrompt", "accepted", "average_prompts", "deepened", "inserted", "layers_of",
           "masked_labels", "placed", "task_groups", "transfer_matrix"]  # fmt: skip


class Contexts(NamedTuple):
    """Vectors [n, d] for the text tower and for the image tower; deep: for each later layer [layers - 1, n, d]."""

    text: Tensor | None
    visual: Tensor | None
    text_deep: Tensor | None = None
    visual_deep: Tensor | None = None


class SoftPrompt(nn.Module):
    """Trained vectors; calling it gives `Contexts`.

    kind     text, visual, or unified: both, from one small transformer that they share
    n_ctx    vectors of each; 0 gives the model as it is
    text, visual  sizes of the towers' vectors
    patch    of the image tower, which the start of its vectors depends on
    project  width of the shared transformer
    deep     layers of the tower whose input has vectors of its own, beside the first one's (VPT-deep); 0: shallow
    """

    def __init__(
        self,
        kind: Literal["text", "visual", "unified"],
        n_ctx: int,
        text: int | None = None,
        visual: int | None = None,
        *,
        patch: int = 16,
        project: int = 128,
        deep: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind == "unified" and deep:
            raise RecipeError(
                "a unified prompt has no vectors for later layers; choose kind text or visual, or no deep"
            )
        if (kind != "visual" and not text) or (kind != "text" and not visual) or n_ctx < 0:
            raise RecipeError(
                f"a {kind} prompt needs the width of the vectors it stands before, and n_ctx of at least 0"
            )
        self.kind, self.n_ctx = kind, n_ctx
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            if kind != "visual" and text:
                self.text = nn.Parameter(0.02 * torch.randn(n_ctx, text))
            if kind != "text" and visual:
                reach = math.sqrt(6 / (3 * patch**2 + visual))
                self.visual = nn.Parameter((2 * torch.rand(n_ctx, visual) - 1) * reach)
            if kind == "unified" and text and visual:
                self.before = nn.ModuleList([nn.Linear(text, project), nn.Linear(visual, project)])
                self.shared = nn.TransformerEncoderLayer(project, 1, project, 0.0, batch_first=True)
                self.after = nn.ModuleList([nn.Linear(project, text), nn.Linear(project, visual)])
            width = text if kind == "text" else visual
            if deep and width:
                reach = math.sqrt(6 / (3 * patch**2 + width))
                start = 0.02 * torch.randn(deep, n_ctx, width) if kind == "text" else None
                self.deep = nn.Parameter((2 * torch.rand(deep, n_ctx, width) - 1) * reach if start is None else start)

    def forward(self) -> Contexts:
        if not self.n_ctx:
            return Contexts(None, None)
        deep = getattr(self, "deep", None)
        if self.kind == "text":
            return Contexts(self.text, None, deep)
        if self.kind == "visual":
            return Contexts(None, self.visual, None, deep)
        joined = torch.cat([self.before[0](self.text), self.before[1](self.visual)])
        mixed = self.shared(joined[None])[0]
        return Contexts(self.after[0](mixed[: self.n_ctx]), self.after[1](mixed[self.n_ctx :]))


def placed(name: Sequence[int], n: int, position: str, stand_in: int) -> tuple[list[int], list[int]]:
    """A class name's tokens among n stand-ins for a prompt's vectors, and where these are.

    position  front, middle or end: where the name goes
    """
    before = {"front": 0, "middle": n // 2, "end": n}[position]
    ids = [*[stand_in] * before, *name, *[stand_in] * (n - before)]
    return ids, [*range(before), *range(before + len(name), len(ids))]


@contextmanager
def inserted(embedding: nn.Module, where: Tensor, vectors: Tensor) -> Iterator[None]:
    """While it lasts, an embedding of tokens gives the vectors [n, d] at `where` [batch, tokens] bool, n a row."""

    def change(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        spread = vectors.to(out.dtype).repeat(len(out), 1)
        return out.masked_scatter(where.unsqueeze(-1), spread)

    handle = embedding.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_class_token(layer: nn.Module, vectors: Tensor | None) -> Iterator[None]:
    """While it lasts, a layer reads the vectors [n, d] between the first token and the others."""

    def change(module: nn.Module, args: Any, kwargs: Any) -> Any:
        assert vectors is not None
        x = args[0] if args else kwargs["hidden_states"]
        x = torch.cat([x[:, :1], vectors.to(x.dtype).expand(len(x), -1, -1), x[:, 1:]], 1)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    handle = None if vectors is None else layer.register_forward_pre_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def deepened(layers: Sequence[nn.Module], vectors: Tensor | None, where: slice | Tensor) -> Iterator[None]:
    """While it lasts, every layer but the first reads its own vectors [layers - 1, n, d] in the prompt's places.

    where  a slice of the tokens, or bool [batch, tokens], n a row
    """

    def change(own: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
        def changed(module: nn.Module, args: Any, kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            spots = where if isinstance(where, Tensor) else torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
            if isinstance(where, slice):
                spots[:, where] = True
            x = x.masked_scatter(spots.unsqueeze(-1), own.to(x.dtype).repeat(len(x), 1))
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

        return changed

    pairs = [] if vectors is None else [*zip(layers[1:], vectors, strict=True)]
    handles = [layer.register_forward_pre_hook(change(own), with_kwargs=True) for layer, own in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_of(module: nn.Module) -> Sequence[nn.Module]:
    """The layers that read a language model's input in turn; RecipeError where they are not found."""
    config: Any = module.config
    encoder: Any = module.get_encoder() if config.is_encoder_decoder else module  # type: ignore[operator]
    for part in encoder.modules():
        if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers:
            return [*part]
    raise RecipeError(
        f"{type(module).__name__}: found no list of its {config.num_hidden_layers} layers; leave deep out"
    )


def masked_labels(logits: Tensor, tasks: Sequence[str], blocks: Mapping[str, slice]) -> Tensor:
    """Logits [batch, all classes] with minus infinity outside the block of each row's task.

    (The authors' code multiplies by 0, so that other tasks' classes keep a share of the probability.)
    """
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    for row, task in enumerate(tasks):
        allowed[row, blocks[task]] = True
    return logits.masked_fill(~allowed, -math.inf)


def average_prompts(prompts: Sequence[Mapping[str, Tensor]], origins: Sequence[str]) -> dict[str, Tensor]:
    """The mean of prompts; warns where they did not start from the same values (`origins`: hashes of their starts).

    Any other merge takes them too: they are tensors.  RecipeError for different shapes.
    """
    shapes = [{name: tuple(t.shape) for name, t in prompt.items()} for prompt in prompts]
    if any(one != shapes[0] for one in shapes):
        raise RecipeError("prompts of different kinds or sizes cannot be averaged")
    if len(set(origins)) > 1:
        warnings.warn("these prompts started from different values: their average has no meaning", stacklevel=2)
    return {name: torch.stack([prompt[name].float() for prompt in prompts]).mean(0) for name in prompts[0]}


# --- which tasks help each other -----------------------------------------------------------------------


def transfer_matrix(names: Sequence[str], adapted: Callable[[str | None, str], float]) -> Tensor:
    """A[i, j]: the score on task j after starting from the prompt of task i, minus that from scratch [n, n] float64.

    adapted  (source or None, target) -> score
    """
    scratch = torch.tensor([adapted(None, name) for name in names], dtype=torch.float64)
    found = torch.tensor([[adapted(a, b) for b in names] for a in names], dtype=torch.float64)
    return found - scratch


def task_groups(transfer: Tensor, names: Sequence[str], threshold: float = 0.0) -> list[list[str]]:
    """Groups of tasks that help each other: average linkage on the symmetric part, while the mean gain is above."""
    gain = ((transfer + transfer.T) / 2).double()
    groups = [[i] for i in range(len(names))]
    while len(groups) > 1:
        pairs = [(float(gain[a][:, b].mean()), i, j) for i, a in enumerate(groups) for j, b in enumerate(groups[:i])]
        best, i, j = max(pairs)
        if best <= threshold:
            break
        groups[j] = sorted([*groups[j], *groups.pop(i)])
    return [[names[i] for i in group] for group in groups]


def accepted(
    groups: Sequence[Sequence[str]], joint: Mapping[str, float], alone: Mapping[str, float]
) -> list[list[str]]:
    """Groups whose mean validation score rises when they are trained together; the others as single tasks."""
    found: list[list[str]] = []
    for group in groups:
        rises = sum(joint[name] - alone[name] for name in group) > 0
        found += [list(group)] if len(group) == 1 or rises else [[name] for name in group]
    return found
