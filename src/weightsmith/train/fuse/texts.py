"""The same texts in the tokens of several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import PlanError, SourceError
from weightsmith.observe.model import LoadedModel, TextCoder, text_coder
from weightsmith.train.fuse.align import Alignment, Place, places

__all__ = ["Tokenizer", "Tokens"]

Spans = Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text, as far as its tokens go.

    ids     int64 [tokens]
    places  of each token, see `align.places`
    text    up to the end of the last token
    scored  UTF-8 bytes of the text behind the first token: of what the model predicts; 0 without any
    """

    ids: Tensor
    places: Sequence[Place | None]
    text: str
    scored: int


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A model's tokenizer, with what is known of the model.

    rows   of its logits
    limit  most tokens that it has positions for
    """

    label: str
    coder: TextCoder
    rows: int
    limit: int

    @classmethod
    def of(cls, loaded: LoadedModel, length: int) -> Tokenizer:
        """Errors: SourceError without a tokenizer that tells where in the text its tokens lie."""
        coder = text_coder(loaded)
        if coder.tokenizer is not None and not coder.tokenizer.is_fast:
            raise SourceError(
                f"{loaded.label}: its tokenizer does not tell places in the text; it needs tokenizer.json"
            )
        return cls(loaded.label, coder, loaded.text_config.vocab_size, loaded.clip_length(length))

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Token -> id, of the ids that the model has rows for; without a tokenizer tokens are bytes."""
        if self.coder.tokenizer is None:
            return {chr(i) if i < 128 else f"<0x{i:02X}>": i for i in range(self.rows)}
        return {token: i for token, i in self.coder.tokenizer.get_vocab().items() if i < self.rows}

    @cached_property
    def special(self) -> Mapping[str, str]:
        """Role -> token, of those that are in the vocabulary."""
        named: dict[str, Any] = {role: getattr(self.coder.tokenizer, f"{role}_token", None) for role in ("bos", "eos")}
        return {role: token for role, token in named.items() if token in self.vocabulary}

    def read(self, text: str, length: int) -> Tokens:
        """The first `length` tokens of a text, fewer where the model has fewer positions.

        Errors: SourceError for a token that the model has no row for.
        """
        ids, spans = self.encode(text)
        prefix = list(self.coder.prefix)
        room = max(min(length, self.limit) - len(prefix), 0)
        ids, spans = [*prefix, *ids[:room]], [*((0, 0) for _ in prefix), *spans[:room]]
        if ids and max(ids) >= self.rows:
            raise SourceError(
                f"{self.label}: its tokenizer gives token {max(ids)}, but the model has {self.rows}; "
                "its folder holds another model's tokenizer"
            )
        end = spans[-1][1] if spans else 0
        roles = {self.vocabulary[token]: role for role, token in reversed(list(self.special.items()))}
        scored = len(text[spans[0][1] : end].encode()) if len(ids) > 1 else 0
        return Tokens(torch.tensor(ids, dtype=torch.int64), places(text, spans, ids, roles), text[:end], scored)

    def cut(self, text: str, length: int) -> list[str]:
        """A text in pieces of about `length` tokens."""
        _, spans = self.encode(text)
        size = max(min(length, self.limit) - len(self.coder.prefix), 1)
        starts = [0, *(spans[i][0] for i in range(size, len(spans), size)), len(text)]
        return [text[a:b] for a, b in pairwise(starts) if a < b]

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens without special ones around them, and the characters that each covers."""
        if self.coder.tokenizer is None:
            pairs = [(byte, (i, i + 1)) for i, character in enumerate(text) for byte in character.encode()]
            return [byte for byte, _ in pairs], [span for _, span in pairs]
        found = self.coder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]

    def to(self, target: Tokenizer) -> Alignment:
        """How this one's tokens become the target's.

        Errors: PlanError where no token is shared.
        """
        if self.vocabulary == target.vocabulary:
            same = torch.arange(self.rows)
            return Alignment(torch.where(same < target.rows, same, -1))
        special = {token: target.special[role] for role, token in self.special.items() if role in target.special}
        try:
            return Alignment.of(self.vocabulary, target.vocabulary, special, self.rows)
        except PlanError as error:
            raise PlanError([f"{self.label}: {error}"]) from None
