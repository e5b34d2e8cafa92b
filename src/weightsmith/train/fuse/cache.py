"""Distributions of the candidates on the target's tokens, computed once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from weightsmith.core.errors import NumericError, OutputError, WeightsmithError
from weightsmith.core.keys import Key
from weightsmith.io.disk import write_file
from weightsmith.io.package.manifest import verify_folder
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import read_json
from weightsmith.observe.model import LoadedModel
from weightsmith.train.fuse.align import Place
from weightsmith.train.fuse.texts import Tokenizer, Tokens
from weightsmith.train.fuse.topk import TopK, top_k
from weightsmith.train.run import padded
from weightsmith.train.save import save_rows

__all__ = ["Cached", "cached_bytes", "kept", "make"]

_STATE = "state.json"
_LIMIT = 1 << 30  # bytes of it


@dataclass(frozen=True, eq=False)
class Cached:
    """One candidate: row starts[i] + t of its file is position t of text i.

    losses   float32 [texts]: mean loss per byte, nan where it predicts nothing of a text
    matched  share of the target's positions where it speaks itself
    """

    source: SafetensorsSource
    starts: Sequence[int]
    losses: Tensor
    matched: float

    @classmethod
    def at(cls, folder: Path, lengths: Sequence[int]) -> Cached:
        source = SafetensorsSource(folder / "model.safetensors")
        starts = [0, *accumulate(lengths)]
        return cls(source, starts, source.read("losses"), read_json(folder / _STATE, _LIMIT)["matched"])

    def of(self, numbers: Sequence[int]) -> TopK:
        """Distributions of some texts, padded on the right: [batch, longest, k]."""
        found = {
            name: pad_sequence([self._rows(name, number) for number in numbers], True) for name in ("ids", "logits")
        }
        return TopK(found["ids"], found["logits"])

    def _rows(self, name: str, number: int) -> Tensor:
        return self.source.block(name, self.starts[number], self.starts[number + 1]).tensor()


def cached_bytes(lengths: Sequence[int], k: int) -> int:
    """Size of a candidate's file."""
    return sum(lengths) * k * 6 + len(lengths) * 4


def kept(folder: Path, identity: Mapping[str, Any], *, ours: bool) -> bool:
    """Whether a candidate of this identity is there, whole.

    ours  the folder belongs to this run, and what does not fit is made anew
    Errors: OutputError where something else is in a folder of the user's.
    """
    if not folder.exists():
        return False
    try:
        said = read_json(folder / _STATE, _LIMIT)["identity"]
        wrong = [key for key in {**said, **identity} if said.get(key) != identity.get(key)]
        damage = [f"is of another {key}" for key in wrong] or [f"is damaged ({text})" for text in verify_folder(folder)]
    except (WeightsmithError, KeyError, TypeError, AttributeError) as error:
        if not ours:
            raise OutputError(f"{folder}: no distributions of an earlier run ({error}); name another cache") from None
        return False
    if damage and not ours:
        raise OutputError(f"{folder}: what is there {damage[0]}; name another cache, or remove this one")
    return not damage


def make(
    folder: Path,
    identity: Mapping[str, Any],
    loaded: LoadedModel,
    tokenizers: tuple[Tokenizer, Tokenizer],
    texts: Sequence[Tokens],
    own: Cached | None,
    *,
    k: int,
    batch: int,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Run a candidate over all texts and write its folder, which appears whole.

    tokenizers  the candidate's and the target's
    texts       in the target's tokens
    own         the target's own distributions, which stay where the candidate's tokens do not match; None for itself
    progress    called after every forward pass
    Errors: NumericError for a loss that is not finite, with the text.
    """
    runner = _Runner(loaded, tokenizers, texts, own, k)
    keys = [Key(n, (sum(len(text.ids) for text in texts), k), d) for n, d in (("ids", "int32"), ("logits", "float16"))]
    keys.append(Key("losses", (len(texts),), "float32"))

    def rows() -> Iterator[tuple[str, int, Tensor]]:
        at, losses = 0, []
        for first in range(0, len(texts), batch):
            numbers = range(first, min(first + batch, len(texts)))
            found, some = runner.run(numbers)
            for row, number in enumerate(numbers):
                count = len(texts[number].ids)
                yield "ids", at, found.ids[row, :count]
                yield "logits", at, found.logits[row, :count]
                at += count
            losses += some
            progress()
        yield "losses", 0, torch.tensor(losses)

    def more(written: Path) -> None:
        state = {"identity": identity, "matched": runner.matched / max(keys[0].shape[0], 1)}
        write_file(written / _STATE, json.dumps(state))

    save_rows(folder, keys, rows(), made=identity, how="run", kind="distributions", package=more, overwrite=True)


class _Runner:
    """A candidate over the texts, one batch after the other; `matched` counts positions."""

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizers: tuple[Tokenizer, Tokenizer],
        texts: Sequence[Tokens],
        own: Cached | None,
        k: int,
    ) -> None:
        self.loaded, self.texts, self.own, self.k = loaded, texts, own, k
        self.tokenizer, self.target = tokenizers
        self.same = self.tokenizer.vocabulary == self.target.vocabulary
        self.alignment = None if own is None else self.tokenizer.to(self.target)
        self.matched = 0

    @torch.no_grad()
    def run(self, numbers: Sequence[int]) -> tuple[TopK, list[float]]:
        """Distributions on the target's tokens [batch, longest, k], and the mean loss of each text per byte."""
        target = [self.texts[number] for number in numbers]
        tokens = target if self.own is None else [self.tokenizer.read(text.text, 1 << 62) for text in target]
        inputs, mask = padded([text.ids if len(text.ids) else torch.zeros(1, dtype=torch.int64) for text in tokens])
        logits = self.loaded.logits(inputs, None if bool(mask.all()) else mask).float()
        losses = [self._loss(*args) for args in zip(numbers, tokens, logits, strict=True)]
        likely = top_k(logits, self.k)
        found = TopK(likely.ids.cpu(), likely.logits.cpu())
        if self.own is None or self.alignment is None:
            self.matched += sum(len(text.ids) for text in target)
            return found, losses
        places = [self._places(*pair) for pair in zip(tokens, target, strict=True)]
        sides = [pair[0] for pair in places], [pair[1] for pair in places]
        self.matched += self.alignment.matched(found, *sides).shape[1]
        return self.alignment.apply(found, self.own.of(numbers), *sides), losses

    def _loss(self, number: int, tokens: Tokens, logits: Tensor) -> float:
        if not tokens.scored:
            return torch.nan
        count = len(tokens.ids)
        value = cross_entropy(logits[: count - 1], tokens.ids[1:].to(logits.device), reduction="sum").item()
        if not torch.isfinite(torch.tensor(value)):
            raise NumericError(f"{self.tokenizer.label}: its loss is {value} on text {number}")
        return value / tokens.scored

    def _places(self, source: Tokens, target: Tokens) -> tuple[Sequence[Place | None], Sequence[Place | None]]:
        """Equal tokens stand for each other, also where several make one character."""
        if self.same and torch.equal(source.ids, target.ids):
            numbered = [(i, i + 1) for i in range(len(target.ids))]
            return numbered, numbered
        return source.places, target.places
