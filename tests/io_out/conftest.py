"""A small output, written block by block as the engine does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from weightsmith.core.keys import DTYPES, Key
from weightsmith.io.write.output import FolderSink

KEYS = (
    Key("embed.weight", (6, 4), "bfloat16"),
    Key("a.mask", (3,), "bool"),
    Key("a.weight", (4, 5), "float32"),
    Key("a.scale", (), "float64"),
    Key("a.empty", (0, 4), "float16"),
    Key("b.weight", (5, 7), "bfloat16"),
    Key("b.steps", (2, 1), "int64"),
    Key("c.weight", (3, 3), "float8_e4m3fn"),
)
IDENTITY = {"recipe": {"method": "linear", "seed": 0}, "inputs": {"math": {"size": 3}}, "version": "0.1.0"}


class Job:
    """Keys with made-up contents, cut into blocks of two rows: one task per tensor."""

    identity = IDENTITY

    def __init__(self, keys: Iterable[Key] = KEYS) -> None:
        self.keys = list(keys)
        noise = np.random.default_rng(0)
        self.bits: dict[str, np.ndarray] = {}
        for key in self.keys:
            high = 2 if key.dtype == "bool" else 120
            raw = noise.integers(0, high, (*key.shape, DTYPES[key.dtype].itemsize), dtype=np.uint8)
            self.bits[key.name] = raw.view(f"u{DTYPES[key.dtype].itemsize}").reshape(key.shape)

    def sink(self, out: Path, **options: Any) -> FolderSink:
        return FolderSink(out, **{"shard_size": 10**9, "identity": self.identity, **options})

    def record(self, sink: FolderSink, key: Key) -> dict[str, Any]:
        """Write a tensor, last block first, and return its record."""
        bits, parts = self.bits[key.name], []
        for start in reversed(range(0, key.rows, 2)):
            block = bits[start : start + 2] if bits.ndim else bits
            sink.write(key.name, start, block)
            parts.append([key.name, start, min(start + 2, key.rows), xxhash.xxh3_128_hexdigest(block.tobytes())])
        return {"parts": parts}

    def run(self, sink: FolderSink, count: int | None = None) -> dict[str, Any]:
        """Do `count` tasks (all by default) that no earlier run has done; return the records of all that are done."""
        sink.begin(self.keys)
        records = dict(sink.completed())
        for key in [key for key in self.keys if key.name not in records][:count]:
            records[key.name] = self.record(sink, key)
            sink.done(key.name, records[key.name])
        return records

    def write(self, out: Path, extra: Callable[[Path], object] = lambda folder: None, **options: Any) -> dict[str, Any]:
        sink = self.sink(out, **options)
        records = self.run(sink)
        with sink.finishing() as folder:
            extra(folder)
        return records

    def check(self, out: Path) -> None:
        """The safetensors library reads back every bit, under the dtype and shape of the key."""
        import torch
        from safetensors import safe_open

        seen = {}
        for path in sorted(out.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
                for name in file.keys():  # noqa: SIM118
                    seen[name] = file.get_tensor(name)
        assert sorted(seen) == sorted(key.name for key in self.keys)
        for key in self.keys:
            assert seen[key.name].dtype == getattr(torch, key.dtype)
            assert tuple(seen[key.name].shape) == key.shape
            raw = seen[key.name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert raw == self.bits[key.name].tobytes(), key.name


@pytest.fixture
def job() -> Job:
    return Job()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder to write to."""
    return tmp_path / "merged"


def tree(folder: Path) -> dict[str, bytes]:
    """Relative name -> bytes of every file."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(name="tree")
def _tree() -> Callable[[Path], dict[str, bytes]]:
    return tree
