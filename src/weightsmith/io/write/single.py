"""A small safetensors file of its own, beside the weights or alone: all of its tensors are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from weightsmith.core.keys import Key
from weightsmith.io.read.source import tensor_to_bits
from weightsmith.io.write.layout import plan_shards

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["file_of"]


def file_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of the file, a tensor at a time."""
    keys = [Key(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
    (shard,) = plan_shards(keys, sum(key.nbytes for key in keys), "model", metadata)
    yield shard.header
    for name in shard.offsets:
        yield tensor_to_bits(tensors[name].cpu()).tobytes()
