"""Every reader of a stranger's bytes, on seeds with small changes: only weightsmith's own errors, and soon."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safety.readers import SEEDS, TARGETS
from safety.refusal import outcome

ATOMS = [
    None,
    True,
    -1,
    0,
    1.5,
    10**12,
    10**30,
    float("nan"),
    "",
    "a",
    "\x1b[2J",
    "\ud800",
    "../x",
    [],
    [[]],
    {},
    {"a": []},
]
BYTES = [b"", b"\0", b"\xff", b"{", b"[[", b'"', b",", b"9" * 20, b"-", b"\x80" * 8, b"\n", b": &a *a"]
COUNT = 60


def test_every_target_has_seeds() -> None:
    assert SEEDS.keys() == TARGETS.keys()


@pytest.mark.parametrize("target", SEEDS)
def test_small_changes(target: str, tmp_path: Path) -> None:
    chance, read = random.Random(target), TARGETS[target](tmp_path)
    seeds, taken = SEEDS[target](), 0
    assert any(outcome(lambda seed=seed: read(seed)) == (None, "") for seed in seeds), "no seed is what it should be"
    for seed in seeds:
        for data in [*changed_bytes(seed, chance), *changed_values(seed, chance)]:
            began = time.process_time()
            taken += not outcome(lambda data=data: read(data))[1]
            assert time.process_time() - began < 5, data
    assert taken > 0


def changed_bytes(seed: bytes, chance: random.Random) -> Iterator[bytes]:
    for _ in range(COUNT):
        data = bytearray(seed)
        for _ in range(chance.choice([1, 1, 2, 5])):
            at = chance.randrange(len(data) + 1)
            data[at : at + chance.choice([0, 1, 1, 8])] = chance.choice(BYTES)
        yield bytes(data)


def changed_values(seed: bytes, chance: random.Random) -> Iterator[bytes]:
    """A JSON text with one of its values exchanged, or one of its names."""
    try:
        json.loads(seed)
    except ValueError:
        return
    for _ in range(COUNT):
        value = json.loads(seed)
        holder, key = chance.choice(list(places(value)))
        if isinstance(holder, dict) and chance.random() < 0.2:
            holder[chance.choice(["", "a", "\x1b", "x" * 2000])] = holder.pop(key)
        else:
            holder[key] = chance.choice(ATOMS)
        yield json.dumps(value).encode()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)
