"""Coverage-guided fuzzing of everything that reads a stranger's bytes: `make torture`.

Each target runs in a process of its own, because atheris does not return: `python fuzz_readers.py TARGET`.
WEIGHTSMITH_FUZZ_SECONDS says for how long (60 by default).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("WEIGHTSMITH_FUZZ_SECONDS", "60"))
SLOWEST = 10  # seconds for one input
MEMORY = 2048  # MB

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def header_seeds() -> list[bytes]:
    two = {"__metadata__": {"format": "pt", "b": "a"}, "a": ENTRY, "c": ENTRY | {"data_offsets": [4, 8]}}
    raws = [json.dumps(value).encode() for value in ({"a": ENTRY}, two, {}, {"a": ENTRY | {"shape": [0, 2]}})]
    return [struct.pack("<Q", len(raw)) + raw + bytes(8) for raw in raws]


def pickle_seeds() -> list[bytes]:
    import torch

    found = []
    for modern in (True, False):
        buffer = io.BytesIO()
        torch.save({"w": torch.ones(2, 2), "n": 3}, buffer, _use_new_zipfile_serialization=modern)
        found.append(buffer.getvalue())
    with zipfile.ZipFile(io.BytesIO(found[0])) as archive:
        found += [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    return found


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"m.*": 2}, "use_rslora": True, "use_dora": False}
RECIPE = b"""base: org/base
models: {a: org/a, b: {model: org/b, weight: 0.5, layers: [0, 4]}}
method: [{dare: {density: 0.5}}, ties]
parameters: {lambda: [0.1, 1.0]}
rules: [{match: "*norm*", role: [q, k], method: keep}]
exclude: [lm_head.weight]
output: {dtype: bfloat16, shard_size: 5GB}
"""
SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "header": header_seeds,
    "index": lambda: [json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.bin"}}).encode()],
    "recipe": lambda: [RECIPE, json.dumps({"models": {"a": "x"}, "method": "linear"}).encode()],
    "adapter": lambda: [json.dumps(LORA).encode(), json.dumps(LORA | {"use_dora": True}).encode()],
    "card": lambda: [b"---\nlicense: other\nlicense_name: own\ntags: [a]\n---\n", b"---\nlicense: [mit, bsd]\n---\n"],
    "manifest": lambda: [b'{"output": {"files": {}, "tensors": {}}, "recipe": {}, "inputs": {}, "kind": "merge"}'],
    "pickle": pickle_seeds,
}  # fmt: skip


@pytest.mark.parametrize("target", SEEDS)
def test_only_our_own_errors_come_out(target: str, tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for i, seed in enumerate(SEEDS[target]()):
        (seeds / str(i)).write_bytes(seed)
    limits = [f"-max_total_time={SECONDS}", f"-timeout={SLOWEST}", f"-rss_limit_mb={MEMORY}", "-max_len=4096"]
    words = [sys.executable, __file__, target, *limits, f"-artifact_prefix={tmp_path}/", str(seeds)]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=SECONDS + 300, check=False)
    kept = [f"{path.name}: {path.read_bytes()[:300]!r}" for path in tmp_path.iterdir() if path.is_file()]
    assert done.returncode == 0, f"{done.stderr[-6000:]}\n{kept}"
    count = next(line for line in reversed(done.stderr.splitlines()) if line.startswith("Done "))
    sys.stderr.write(f"{target}: {count}\n")


# --- the targets -----------------------------------------------------------------------------------


def reads_header(place: Path) -> Callable[[bytes], None]:
    import safetensors

    from weightsmith.io.safetensors import parse_header, parse_length

    def read(data: bytes) -> None:
        length = parse_length(data[:8], len(data), "x")
        header = parse_header(data[8 : 8 + length], len(data), "x")
        try:
            theirs = dict(safetensors.deserialize(data))
        except safetensors.SafetensorError as error:
            raise AssertionError("we accept what the safetensors library refuses") from error
        assert {name: list(key.shape) for name, key in header.keys.items()} == {
            n: t["shape"] for n, t in theirs.items()
        }
        for name, (key, offset) in header.tensors.items():
            assert bytes(theirs[name]["data"]) == data[offset : offset + key.nbytes]

    return read


def reads_index(place: Path) -> Callable[[bytes], None]:
    from weightsmith.io.folder import parse_index

    def read(data: bytes) -> None:
        for file in parse_index(data, "x").values():
            assert (place / file).parent == place

    return read


def reads_recipe(place: Path) -> Callable[[bytes], None]:
    from weightsmith.recipe.load import loads
    from weightsmith.recipe.text import dumps

    def read(data: bytes) -> None:
        recipe = loads(data.decode("utf-8", "replace"))
        assert loads(dumps(recipe)) == recipe

    return read


def reads_adapter(place: Path) -> Callable[[bytes], None]:
    import torch
    from safetensors.torch import save_file

    from weightsmith.io.peft import AdapterSource
    from weightsmith.io.source import MemorySource

    factors = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)}
    stored = {f"base_model.model.m.{part}.weight": tensor for part, tensor in factors.items()}
    save_file(stored, place / "adapter_model.safetensors")
    base = MemorySource({"m.weight": torch.zeros(4, 3)})

    def read(data: bytes) -> None:
        (place / "adapter_config.json").write_bytes(data)
        assert AdapterSource(place, base).read("m.weight").shape == (4, 3)

    return read


def reads_card(place: Path) -> Callable[[bytes], None]:
    from weightsmith.io.card import licence_problems, licences

    def read(data: bytes) -> None:
        (place / "README.md").write_bytes(data)
        stated = licences({"m": place})
        assert stated["m"].isprintable()
        licence_problems(stated | {"other": "mit"})

    return read


def reads_manifest(place: Path) -> Callable[[bytes], None]:
    from weightsmith.io.manifest import verify_folder, write_manifest
    from weightsmith.io.open import folder_kind

    def read(data: bytes) -> None:
        (place / "weightsmith.json").write_bytes(data)
        folder_kind(place)
        value = None
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(data)
        if isinstance(value, dict):  # with a checksum that fits
            value.pop("xxh3_128", None)
            with contextlib.suppress(UnicodeEncodeError):
                write_manifest(place, value)
        verify_folder(place)

    return read


def reads_pickle(place: Path) -> Callable[[bytes], None]:
    from weightsmith.io.pickle import PickleSource

    def read(data: bytes) -> None:
        (place / "m.bin").write_bytes(data)
        source = PickleSource(place / "m.bin")
        for name in source.keys:
            source.bits(name, 0, 2)

    return read


TARGETS = {name.removeprefix("reads_"): make for name, make in globals().items() if name.startswith("reads_")}


def fuzz(target: str, options: list[str]) -> None:
    import atheris

    sys.path.insert(0, str(Path(__file__).parents[1]))
    with atheris.instrument_imports(include=["weightsmith.io", "weightsmith.recipe", "ruamel.yaml.scanner",
                                             "torch._weights_only_unpickler"]):  # fmt: skip
        read = TARGETS[target](Path(tempfile.mkdtemp(dir=Path(options[-1]).parent)))
        from safety.refusal import outcome

    def once(data: bytes) -> None:
        outcome(lambda: read(data))

    atheris.Setup([sys.argv[0], *options], once)
    atheris.Fuzz()


if __name__ == "__main__":
    fuzz(sys.argv[1], sys.argv[2:])
