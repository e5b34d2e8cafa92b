"""For every token of a donor's vocabulary: the model's row for it, the donor's, and whether it is an anchor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.core.errors import SourceError
from weightsmith.core.lazy import torch
from weightsmith.io.read.source import Source
from weightsmith.tokens.match import byte_twin, keys_of, prefixes, roles_of, spelling, texts
from weightsmith.tokens.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pairing", "pair", "pieces_of", "role_numbers", "undertrained"]

_STEP = 4096
_UNUSED = ("unused_token", "reserved_special_token", "<unused")
_SHARE = 0.01
"""At most this share of the tokens is taken for under-trained by likeness to unused ones."""


@dataclass(frozen=True)
class Pairing:
    """Rows of a donor's vocabulary.

    own      int64 [rows]: the model's row that is taken as it is, or -1
    shared   int64 [rows]: the model's row for the same token, or -1 (`own` may also have prefixes and bytes)
    theirs   int64 [rows]: the donor's row, or -1 where no token has this number
    anchors  int64 [n]: numbers of tokens that both have
    pieces   row -> the model's tokens that its text is cut into, for the subword method
    """

    own: np.ndarray
    shared: np.ndarray
    theirs: np.ndarray
    anchors: np.ndarray
    pieces: Mapping[int, list[int]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return int(self.own.size)

    @property
    def kept(self) -> int:
        """How many of the model's rows are taken as they are."""
        return int((self.own >= 0).sum())

    @property
    def new(self) -> int:
        """How many rows are made for tokens of the donor."""
        return int(((self.own < 0) & (self.theirs >= 0)).sum())


def pair(
    model: Vocabulary,
    donor: Vocabulary,
    rows: tuple[int, int],
    *,
    multiple: int = 1,
    by_prefix: bool = False,
    by_byte: bool = False,
    bad: tuple[np.ndarray, np.ndarray] | None = None,
    pieces: Mapping[int, list[int]] | None = None,
) -> Pairing:
    """Find the tokens of `donor` in `model`; rows: how many rows each of the two has.

    bad   bool [rows] of the model and of the donor: under-trained tokens, which are no anchors
    """
    known: dict[str, int] = {}
    for number, keys in keys_of(model):
        if number < rows[0]:
            for key in keys:
                known.setdefault(key, number)
    size = donor.size + -donor.size % multiple
    shared, own, theirs = (np.full(size, -1, np.int64) for _ in range(3))
    for number, keys in keys_of(donor):
        if number < rows[1]:
            theirs[number] = number
        shared[number] = next((known[key] for key in keys if key in known), -1)
        if shared[number] < 0:
            text = keys[-1]
            also = [twin] if by_byte and (twin := byte_twin(text)) else []
            also += prefixes(text) if by_prefix and len(keys) == 1 and text not in donor.added else []
            own[number] = next((known[key] for key in also if key in known), -1)
    own = np.where(shared >= 0, shared, own)
    fine = (shared >= 0) & (theirs >= 0)
    if bad is not None:
        fine[fine] = ~bad[0][shared[fine]] & ~bad[1][theirs[fine]]
    return Pairing(own, shared, theirs, np.flatnonzero(fine), pieces or {})


def role_numbers(vocabulary: Vocabulary) -> dict[str, Any]:
    """Config fields of special tokens by a tokenizer's own files: {'eos_token_id': 2}."""
    named = roles_of(vocabulary.folder).items()
    return {f"{role}_token_id": vocabulary.ids[token] for role, token in named if token in vocabulary.ids}


def pieces_of(model: Vocabulary, donor: Vocabulary, rows: int) -> dict[int, list[int]]:
    """Number of a donor's token -> the model's tokens that its text is cut into; no code of the folder is run."""
    path = None if model.folder is None else model.folder / "tokenizer.json"
    if path is None or not path.is_file():
        raise SourceError(f"{model.folder}: the method subword needs tokenizer.json; save the tokenizer as that")
    try:
        from tokenizers import Tokenizer

        cutter = Tokenizer.from_file(str(path))
    except Exception as error:
        raise SourceError(f"{path} cannot be read as a tokenizer: {error}") from None
    blocks = spelling(model) == "blocks"  # such tokenizers put the space in front of a text themselves
    listed = [(number, text) for text, number in texts(donor) if "\0" not in text]
    cut = cutter.encode_batch(
        [text[1:] if blocks and text.startswith(" ") else text for _, text in listed], add_special_tokens=False
    )
    return {
        number: [i for i in found.ids if i < rows] for (number, _), found in zip(listed, cut, strict=True)
    }  # fmt: skip


def undertrained(source: Source, tensors: tuple[str, ...], vocabulary: Vocabulary) -> np.ndarray:
    """Bool [rows]: tokens whose row lies near the mean of rows that were never trained (arXiv 2405.05417).

    Never trained are rows without a token and tokens that are called so.  Near is a cosine above 0.5 and among the
    largest hundredth.  Where no such rows are known none is taken for under-trained.
    """
    count = source.key(tensors[0]).rows
    unused = np.ones(count, bool)
    unused[[n for n in vocabulary.ids.values() if n < count]] = False
    unused[[n for t, n in vocabulary.ids.items() if n < count and any(word in t for word in _UNUSED)]] = True
    found = unused.copy()
    for name in tensors:
        if len(source.key(name).shape) != 2 or not unused.any():
            continue
        mask = torch.from_numpy(unused)
        total = torch.zeros(source.key(name).row_numel, dtype=torch.float64)
        for low, block in _blocks(source, name):
            total += block[mask[low : low + len(block)]].sum(dim=0)
        near = torch.cat([
            torch.nn.functional.cosine_similarity(block, total.unsqueeze(0), dim=1)
            for _, block in _blocks(source, name)
        ]).numpy()  # fmt: skip
        found |= near > max(0.5, float(np.quantile(near[~unused], 1 - _SHARE)) if not unused.all() else 1.0)
    return found


def _blocks(source: Source, name: str) -> Any:
    rows = source.key(name).rows
    for low in range(0, rows, _STEP):
        block: Tensor = source.read(name, low, min(low + _STEP, rows)).double()
        yield low, block
