"""Counter-based noise: random bits that depend on what they are for, never on when they are drawn.

A stream belongs to (seed, tensor name, expert, salt); its i-th number belongs to flat position i of the
tensor.  So any block of rows, thread, process or device sees the same numbers.  The generator is Philox
4x64 (Salmon et al., SC 2011; NumPy's stream is part of its compatibility promise), keyed by a 128-bit hash.

The expert is known by its *name*, not by its position: leaving out or reordering experts keeps the masks
of the others; renaming one changes its mask.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from weightsmith.core.lazy import torch
from weightsmith.core.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["bernoulli", "draws", "keep_masks", "limit", "normal", "stream", "uniform_bits"]

_WORDS = 4  # of 64 bits per counter step


def stream(seed: int, name: str, expert: str, salt: str) -> tuple[int, int]:
    """A stream's 128-bit key in two halves, the lower one first, as signed 64-bit numbers."""
    text = "\0".join((str(seed), name, expert, salt))  # \0 is in no name: no two tuples share a text
    low, high = struct.unpack("<2q", hashlib.blake2b(text.encode(), digest_size=16).digest())
    return low, high


def uniform_bits(seed: int, name: str, expert: str, salt: str, offset: int, count: int) -> np.ndarray:
    """Numbers offset .. offset + count of a stream, as uint32: any part equals that part of the whole."""
    return _numbers(stream(seed, name, expert, salt), 0, "<u4", offset, count)


def _numbers(key: tuple[int, int], part: int, form: str, offset: int, count: int) -> np.ndarray:
    """Numbers offset .. offset + count of the part of a stream whose counters have `part` as second word."""
    # The counter is the position, the key says what for.  `part` in its second word is 2^64 steps away from the others.
    generator = np.random.Philox(counter=[0, part, 0, 0], key=np.array(key, np.int64).view(np.uint64))
    per_word = 8 // np.dtype(form).itemsize
    # A step makes four words of 64 bits; within them numbers are cut out in little-endian order on all machines.
    step, skip = divmod(offset, _WORDS * per_word)
    generator.advance(step)
    words = np.asarray(generator.random_raw(-(-(skip + count) // per_word)), dtype="<u8")
    return words.view(form)[skip : skip + count]


def limit(share: float | np.ndarray) -> np.ndarray:
    """A number of 32 bits below this one is drawn with probability `share`, rounded to multiples of 2^-32: uint64."""
    return np.rint(np.asarray(share, np.float64) * 2**32).astype(np.uint64)


def bernoulli(
    seed: int, name: str, expert: str, salt: str, offset: int, count: int, share: float | np.ndarray
) -> np.ndarray:
    """True with probability `share`, one or [count] (rounded to multiples of 2^-32): bool [count].  So exact.

    A number's upper 16 bits come from the stream's first part and its lower 16 from the second, which the kernels
    need not draw where the upper ones decide: that halves the work.
    """
    # As one 32-bit number: upper half from one part, lower half from the other.
    key = stream(seed, name, expert, salt)
    upper, lower = (_numbers(key, part, "<u2", offset, count) for part in (0, 1))
    return np.asarray((upper.astype(np.uint32) << 16 | lower) < limit(share))


def normal(seed: int, name: str, expert: str, salt: str, offset: int, count: int) -> np.ndarray:
    """Standard normal numbers offset .. offset + count of a stream (Box and Muller 1958): float64 [count]."""
    # Two uniform numbers for one normal: the sine of Box and Muller is left, so that number i depends on pair i alone.
    bits = uniform_bits(seed, name, expert, salt, 2 * offset, 2 * count).astype(np.float64).reshape(count, 2)
    radius = np.sqrt(-2 * np.log((bits[:, 0] + 1) / 2**32))  # the logarithm's argument is in (0, 1]
    return np.asarray(radius * np.cos(bits[:, 1] * (2 * np.pi / 2**32)))


def draws(seed: int, name: str, experts: Sequence[str], salt: str, shares: Sequence[float]) -> np.ndarray:
    """What the kernels need for the masks of a tensor: [n, 3] int64, the halves of a stream's key and `limit`."""
    keys = [stream(seed, name, expert, salt) for expert in experts]
    return np.column_stack([np.array(keys, np.int64).reshape(-1, 2), limit(np.array(shares)).astype(np.int64)])


def keep_masks(site: Site, shares: Sequence[float | Tensor], salt: str) -> Tensor:
    """One independent mask per expert, True with probability shares[i]: bool [n, *block] on the stack's device.

    A share is one number, or a tensor shaped like the block.
    """
    size = site.stack[0].numel()
    # numpy compares on the CPU, and the masks go to the device: a GPU has no other noise.
    known = [share if isinstance(share, (int, float)) else share.reshape(-1).cpu().numpy() for share in shares]
    masks = [
        torch.from_numpy(bernoulli(site.seed, site.key.name, expert, salt, site.offset, size, share))
        for expert, share in zip(site.names, known, strict=True)
    ]
    return torch.stack(masks).reshape(site.stack.shape).to(site.stack.device)
