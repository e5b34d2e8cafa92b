"""Bring distributions from one tokenizer to another, as FuseLLM needs it (arXiv 2401.10491)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from weightsmith.core.errors import PlanError
from weightsmith.train.fuse.topk import TopK

__all__ = ["Alignment", "edit_distance", "map_vocabulary", "match", "places"]

_SPACES = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})


def _plain(token: str) -> str:
    """A token without its tokenizer's sign for a space."""
    return token.translate(_SPACES)


@lru_cache(maxsize=1 << 20)
def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions and replacements between two texts (Levenshtein 1966)."""
    if len(one) < len(other):
        one, other = other, one
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def map_vocabulary(source: Mapping[str, int], target: Mapping[str, int], size: int = 0, near: int = 1) -> Tensor:
    """The target's token for each of the source's: int64 [vocabulary], -1 for none.

    source, target  token -> id, as `tokenizer.get_vocab()` gives
    size            rows of the source's logits, where it has more than tokens
    near            largest edit distance that counts as the same, among tokens that begin alike; 0: equal ones only

    Equal texts first, then the nearest one, of several the one of the lowest id.
    """
    texts: dict[str, int] = {}
    starts: dict[str, list[tuple[str, int]]] = {}
    for token, i in sorted(target.items(), key=lambda item: item[1]):
        texts.setdefault(_plain(token), i)
        starts.setdefault(_plain(token)[:2], []).append((_plain(token), i))
    found = torch.full((max([size, *(i + 1 for i in source.values())]),), -1)
    for token, i in source.items():
        text = _plain(token)
        if text in texts:
            found[i] = texts[text]
        elif near and len(text) > 2:
            distances = [(edit_distance(text, other), j) for other, j in starts.get(text[:2], ())
                         if abs(len(text) - len(other)) <= near]  # fmt: skip
            if distances and min(distances)[0] <= near:
                found[i] = min(distances)[1]
    return found


Place = tuple[int, int] | str
"""Where a token lies in the text (first character, end), or the role of a special token ('bos', 'eos', ...)."""


def places(
    text: str, offsets: Sequence[tuple[int, int]], ids: Sequence[int], roles: Mapping[int, str]
) -> list[Place | None]:
    """The place of each token, without the spaces around it; None for tokens that are neither text nor special.

    offsets  as fast tokenizers give with return_offsets_mapping=True
    roles    id of a special token -> its role, which the other tokenizer's has too
    """
    found: list[Place | None] = []
    for token, (start, stop) in zip(ids, offsets, strict=True):
        piece = text[start:stop]
        first, last = start + len(piece) - len(piece.lstrip()), stop - (len(piece) - len(piece.rstrip()))
        found.append(roles.get(token, (first, last) if first < last else None))
    return found


def match(source: Sequence[Place | None], target: Sequence[Place | None]) -> list[int]:
    """For each target token the source token that stands for it alone, -1 where none does.

    Two tokens match where they cover the same characters and nothing else in either list does; special tokens of one
    role match in order.  FuseLLM warps the lists by edit distances instead, which pairs `unbelievable` with the middle
    one of `un believ able`.
    """
    at = {place: i for i, place in enumerate(_numbered(source)) if place is not None}
    return [-1 if place is None else at.get(place, -1) for place in _numbered(target)]


def _numbered(places: Sequence[Place | None]) -> list[tuple[Place, int] | None]:
    """Places with the number of their occurrence; None for text that several tokens cover."""
    total, seen, found = Counter(places), Counter[Place](), list[tuple[Place, int] | None]()
    for place in places:
        if place is None or (not isinstance(place, str) and total[place] > 1):
            found.append(None)
        else:
            found.append((place, seen[place]))
            seen[place] += 1
    return found


@dataclass(frozen=True, eq=False)
class Alignment:
    """A source's tokenizer seen from the target's.

    vocabulary  the target's token for each of the source's: int64, -1 for none (`map_vocabulary`)
    """

    vocabulary: Tensor

    @classmethod
    def of(
        cls,
        source: Mapping[str, int],
        target: Mapping[str, int],
        special: Mapping[str, str] | None = None,
        size: int = 0,
    ) -> Alignment:
        """`special`: source token -> target token of the same role ('[CLS]': '<s>'); `size` as in `map_vocabulary`.

        Errors: PlanError where no token is shared, or a special token is missing.
        """
        special = dict(special or {})
        for pair in special.items():
            for token, vocabulary in zip(pair, (source, target), strict=True):
                if token not in vocabulary:
                    raise PlanError([f"special token {token!r} is not in the vocabulary that should have it"])
        mapped = map_vocabulary(source, target, size)
        for token, other in special.items():
            mapped[source[token]] = target[other]
        if not bool((mapped >= 0).any()):
            raise PlanError(["the two vocabularies share no token; these models cannot be fused"])
        return cls(mapped)

    def apply(
        self,
        found: TopK,
        own: TopK,
        source: Sequence[Sequence[Place | None]],
        target: Sequence[Sequence[Place | None]],
    ) -> TopK:
        """A source's distributions on the target's tokens and positions, [batch, target length, k].

        found           the source's, on its own
        own             the target's, which stay where no single source token matches, or none of its k is known
        source, target  the places of the tokens of each sequence, in both tokenizers, without padding (`places`)
        """
        k = min(found.ids.shape[2], own.ids.shape[2])
        ids, logits = own.ids[..., :k].clone(), own.logits[..., :k].clone()
        rows, at, other = self.matched(found, source, target)
        mapped = self.vocabulary[found.ids[rows, other].long()]
        known = torch.where(mapped >= 0, found.logits[rows, other], -torch.inf)
        values, best = known.topk(k, -1)
        ids[rows, at] = mapped.gather(-1, best).clamp(min=0).to(ids.dtype)
        logits[rows, at] = values
        return TopK(ids, logits)

    def matched(
        self, found: TopK, source: Sequence[Sequence[Place | None]], target: Sequence[Sequence[Place | None]]
    ) -> Tensor:
        """Where the source speaks: int64 [3, n] of sequence, target position, source position."""
        pairs = [
            (row, at, other)
            for row, pair in enumerate(zip(source, target, strict=True))
            for at, other in enumerate(match(*pair))
            if other >= 0
        ]
        where = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3).T
        known = self.vocabulary[found.ids[where[0], where[2]].long()] >= 0
        return where[:, known.any(-1)]
