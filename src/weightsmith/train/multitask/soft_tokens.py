"""Labels and maps as tokens of one vocabulary; codes of maps are decoded softly (All in Tokens, arXiv 2301.02229)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from weightsmith.core.errors import RecipeError
from weightsmith.train.multitask.body import Body
from weightsmith.train.multitask.data import Answer, Pair, Task, Tasks, checked_pixels
from weightsmith.train.multitask.recipe import SoftTokens
from weightsmith.train.multitask.system import System

__all__ = ["Codebook", "SoftTokenModel", "expected", "mask_augment"]


def mask_augment(maps: Tensor, ratio: float, patch: int, generator: torch.Generator | None = None) -> Tensor:
    """Maps [batch, channels, H, W] with ceil(ratio n) of their n patches set to 0, at random."""
    batch, _, height, width = maps.shape
    if height % patch or width % patch:
        raise RecipeError(f"maps of {height} x {width} are not divisible by patches of {patch}")
    rows, columns = height // patch, width // patch
    count = math.ceil(ratio * rows * columns)
    order = torch.rand(batch, rows * columns, generator=generator).argsort(1)
    kept = (order >= count).view(batch, 1, rows, columns).to(maps.device)
    return maps * kept.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def expected(logits: Tensor, codes: Tensor, tau: float = 1.0, *, soft: bool = True) -> Tensor:
    """softmax(tau z) E [..., d] of logits [..., K] and codes [K, d]; hard: the row of the likeliest code."""
    if not soft:
        return codes[logits.argmax(-1)]
    return (tau * logits.float()).softmax(-1).to(codes.dtype) @ codes


class Codebook(nn.Module):
    """A VQ-VAE of small maps: one code for every patch, decoded together with its neighbours.

    Codes are moving averages of what they stand for; those that stand for nothing are put onto inputs at random.
    """

    def __init__(self, channels: int, codes: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.enter = nn.Sequential(
            nn.Conv2d(channels, width, patch, patch), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.leave = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, channels * patch * patch, 1)
        )
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("counts", torch.ones(codes))
        self.codes: Tensor
        self.counts: Tensor

    def nearest(self, encoded: Tensor) -> Tensor:
        """Numbers of the nearest codes [...], of vectors [..., width]."""
        return torch.cdist(encoded.flatten(0, -2), self.codes).argmin(-1).view(encoded.shape[:-1])

    def encode(self, maps: Tensor) -> Tensor:
        """Maps [batch, channels, H, W] -> vectors [batch, H / patch, W / patch, width]."""
        vectors: Tensor = self.enter(maps).permute(0, 2, 3, 1)
        return vectors

    def decode(self, vectors: Tensor) -> Tensor:
        """Vectors [batch, h, w, width] -> maps [batch, channels, h patch, w patch]."""
        return nn.functional.pixel_shuffle(self.leave(vectors.permute(0, 3, 1, 2)), self.patch)

    @torch.no_grad()
    def follow(self, encoded: Tensor, draw: torch.Generator, decay: float = 0.95) -> None:
        """Move the codes towards the mean of the vectors that are nearest to each."""
        vectors = encoded.flatten(0, -2)
        own = one_hot(self.nearest(vectors), len(self.codes)).to(vectors.dtype)
        count = own.sum(0)
        self.counts.mul_(decay).add_(count, alpha=1 - decay)
        used = count > 0
        means = (own.T @ vectors)[used] / count[used, None]
        self.codes[used] += (1 - decay) * (means - self.codes[used])
        dead = self.counts < 0.02
        if bool(dead.any()):
            chosen = torch.randint(len(vectors), (int(dead.sum()),), generator=draw).to(vectors.device)
            self.codes[dead], self.counts[dead] = vectors[chosen], 1.0

    def learn(
        self,
        maps: Tensor,
        valid: Tensor,
        *,
        steps: int,
        batch: int = 16,
        ratio: float = 0.5,
        lr: float = 3e-3,
        seed: int = 0,
    ) -> list[float]:
        """Train on maps [n, channels, H, W], some patches masked; pixels without a label are 0, and do not count."""
        draw = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), lr)
        losses = []
        given = torch.where(valid, maps, 0.0)
        for step in range(steps):
            chosen = torch.randint(len(maps), (min(batch, len(maps)),), generator=draw).to(maps.device)
            encoded = self.encode(mask_augment(given[chosen], ratio, self.patch, draw) if ratio else given[chosen])
            if not step:
                at = torch.randint(encoded.flatten(0, 2).shape[0], (len(self.codes),), generator=draw).to(maps.device)
                self.codes.copy_(encoded.detach().flatten(0, 2)[at])
            self.follow(encoded.detach(), draw)
            near = self.codes[self.nearest(encoded.detach())]
            out = self.decode(encoded + (near - encoded).detach())  # the gradient goes straight through
            loss = masked_error(out, maps[chosen], valid[chosen]) + 0.25 * (encoded - near).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        return losses

    def usage(self, maps: Tensor) -> float:
        """The share of codes that these maps use."""
        return len(set(self.nearest(self.encode(maps)).flatten().tolist())) / len(self.codes)


def masked_error(out: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The mean square error of the valid pixels."""
    return (out - target)[valid].square().mean() if bool(valid.any()) else out.sum() * 0


class SoftTokenModel(System):
    """The model's hidden states, and a causal decoder that writes one class, or the codes of a map, row by row.

    The vocabulary has a block for each task, and no probability leaves a task's block.  Its codebook is learned first
    and then frozen.  Loss: cross-entropy of the tokens, plus the error of the softly decoded map.
    """

    def __init__(self, body: Body, tasks: Tasks, given: SoftTokens, *, seed: int = 0, learn: bool = True) -> None:
        super().__init__(body, tasks)
        self.given, d = given, body.probe(next(iter(tasks.values()))).levels[-1].shape[-1]
        if text := [task.name for task in tasks.values() if task.kind == "text"]:
            raise RecipeError(f"task {text[0]!r} answers in texts; by: soft_tokens writes classes and maps")
        maps = {name: task for name, task in tasks.items() if task.kind == "map"}
        checked_pixels(maps, given.patch, "patches of")
        self.sizes = [given.codes if task.kind == "map" else max(task.classes, 2) for task in tasks.values()]
        self.names, self.maps = list(tasks), list(maps)
        self.offsets = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        steps = max([_count(task, given.patch) for task in maps.values()], default=1)
        self.own["books"] = nn.ModuleList(
            Codebook(task.classes, given.codes, given.width, given.patch) for task in maps.values()
        )
        spots = self._seen(
            [next(pair.input for part in next(iter(tasks.values())).parts.values() for pair in part)]
        ).shape[1]
        self.own["writer"] = _Writer(d, given.width, len(tasks), sum(self.sizes), steps, spots)
        self.own.to(body.device)
        self.usage: dict[str, float] = {}
        if learn:
            for name, task in maps.items():
                self._learn(task, self._book(name), seed)
        frozen_books: Any = self.own["books"]
        frozen_books.requires_grad_(False)

    def _learn(self, task: Task, book: Codebook, seed: int) -> None:
        target = torch.stack([p.answer for p in task.parts["train"] if isinstance(p.answer, Tensor)]).to(
            self.body.device
        )
        book.learn(target, task.counts(target), steps=self.given.vae_steps, ratio=self.given.mask, seed=seed)
        self.usage[task.name] = book.usage(torch.where(task.counts(target), target, 0.0))

    def _book(self, name: str) -> Codebook:
        books: Any = self.own["books"]
        book: Codebook = books[self.maps.index(name)]
        return book

    def _block(self, name: str) -> slice:
        i = self.names.index(name)
        return slice(self.offsets[i], self.offsets[i] + self.sizes[i])

    def _tokens(self, task: Task, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens inside the block [batch, n]; the maps and their valid pixels, of labels empty."""
        if task.kind == "label":
            empty = torch.zeros(0)
            return torch.tensor([[pair.answer] for pair in pairs], device=self.body.device), empty, empty.bool()
        target = torch.stack([p.answer for p in pairs if isinstance(p.answer, Tensor)]).to(self.body.device)
        book, valid = self._book(task.name), task.counts(target)
        with torch.no_grad():
            return book.nearest(book.encode(torch.where(valid, target, 0.0))).flatten(1), target, valid

    def _seen(self, inputs: Sequence[Any]) -> Tensor:
        """The last hidden states [batch, n, d]; those of pixels as means of patches."""
        found = self.body.hidden(inputs)
        if found.grid is None:
            return found.levels[-1]
        square = found.levels[-1].transpose(1, 2)
        square = square.reshape(*square.shape[:2], *found.grid)
        return nn.functional.avg_pool2d(square, self.given.patch).flatten(2).transpose(1, 2)

    def logits(self, task: Task, seen: Tensor, fed: Tensor) -> Tensor:
        """Logits of the block [batch, n + 1, K] after inputs fed back [batch, n, width]."""
        writer: Any = self.own["writer"]
        out: Tensor = writer(seen, self.names.index(task.name), fed)
        return out[..., self._block(task.name)]

    def _rows(self, task: Task) -> Tensor:
        """Embeddings of the task's tokens [K, width]."""
        writer: Any = self.own["writer"]
        rows: Tensor = writer.tokens.weight[self._block(task.name)]
        return rows

    def loss(self, task: Task, pairs: Sequence[Pair]) -> tuple[Tensor, int]:
        tokens, target, valid = self._tokens(task, pairs)
        seen = self._seen([pair.input for pair in pairs])
        z = self.logits(task, seen, self._rows(task)[tokens[:, :-1]])
        value = cross_entropy(z.float().transpose(1, 2), tokens, reduction="sum")
        if task.kind == "map" and self.given.map_weight and self.given.soft:
            error = masked_error(self._map(task, z, target.shape), target, valid)
            value = value + self.given.map_weight * tokens.numel() * error
        return value, tokens.numel()

    def _map(self, task: Task, z: Tensor, shape: Sequence[int], *, soft: bool = True) -> Tensor:
        book = self._book(task.name)
        height, width = (side // self.given.patch for side in shape[-2:])
        vectors = expected(z, book.codes, soft=soft)
        return book.decode(vectors.view(len(z), height, width, -1))

    def predict(
        self, task: Task, pairs: Sequence[Pair], *, soft: bool | None = None, feedback: bool | None = None
    ) -> list[Answer]:
        """Write token by token; soft and feedback: in place of the recipe's."""
        soft = self.given.soft if soft is None else soft
        feedback = self.given.feedback if feedback is None else feedback
        seen = self._seen([pair.input for pair in pairs])
        rows = self._rows(task)
        fed = rows.new_zeros(len(pairs), 0, rows.shape[1])
        count = _count(task, self.given.patch)
        z = self.logits(task, seen, fed)
        for _ in range(count - 1):
            fed = torch.cat([fed, expected(z[:, -1:], rows, soft=soft and feedback)], 1)
            z = self.logits(task, seen, fed)
        if task.kind == "label":
            return list(z[:, -1].argmax(-1).tolist())
        shape = next(p.answer.shape for p in pairs if isinstance(p.answer, Tensor))
        return list(self._map(task, z, shape, soft=soft).float().cpu())

    def told(self) -> Mapping[str, Any]:
        blocks = {name: [self.offsets[i], self.offsets[i] + self.sizes[i]] for i, name in enumerate(self.names)}
        return {"blocks": blocks, "codes_used": self.usage}


class _Writer(nn.Module):
    """Two causal transformer layers that look at hidden states [batch, n, d]: inputs -> logits of all tokens."""

    def __init__(self, d: int, width: int, tasks: int, vocabulary: int, steps: int, spots: int) -> None:
        super().__init__()
        self.enter = nn.Linear(d, width)
        self.task = nn.Embedding(tasks, width)
        self.place = nn.Embedding(steps, width)
        self.spots = nn.Parameter(0.02 * torch.randn(spots, width))
        self.tokens = nn.Embedding(vocabulary, width)
        heads = max(h for h in (1, 2, 4) if width % h == 0)
        layer = nn.TransformerDecoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, 2)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, seen: Tensor, task: int, fed: Tensor) -> Tensor:
        first = self.task.weight[task].expand(len(fed), 1, -1)
        x = torch.cat([first, fed], 1)
        x = x + self.place.weight[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        out: Tensor = self.out(
            self.layers(x, self.enter(seen) + self.spots[: seen.shape[1]], tgt_mask=mask, tgt_is_causal=True)
        )
        return out


def _count(task: Task, patch: int) -> int:
    """Tokens of an answer."""
    answer = next(pair.answer for part in task.parts.values() for pair in part)
    return answer.shape[-2] // patch * (answer.shape[-1] // patch) if isinstance(answer, Tensor) else 1
