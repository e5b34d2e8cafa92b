"""Everything that reads a stranger's bytes, by name: what it is fed first, and how it is called.

Used with small changes to the seeds in every test run, and under atheris by `make torture`.  A target may raise
weightsmith's own errors; anything else, an assertion too, is a failure.
"""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

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


def gguf_seeds() -> list[bytes]:
    import gguf
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(f"{folder}/m.gguf", "llama")
        writer.add_block_count(1)
        writer.add_head_count(2)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        for name in ("token_embd.weight", "blk.0.attn_q.weight"):
            writer.add_tensor(name, np.ones((4, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [Path(folder, "m.gguf").read_bytes()]


def stats_seeds() -> list[bytes]:
    notes = {"stat": "gram", "examples": 3, "rows": 4, "aliases": {"b": "a"}, "counts": {"a": 4}}
    raw = json.dumps({"__metadata__": {"weightsmith": json.dumps(notes)}, "a": ENTRY}).encode()
    return [struct.pack("<Q", len(raw)) + raw + bytes(4)]


def checkpoint_seeds() -> list[bytes]:
    import warnings

    import torch
    import torch.distributed.checkpoint as dcp

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process only
        dcp.save({"model": {"w": torch.ones(3, 2), "n": torch.tensor(1)}}, checkpoint_id=folder, no_dist=True)
        return [Path(folder, ".metadata").read_bytes()]


def key_seeds() -> list[bytes]:
    from weightsmith.protect.key import Key, Known, new_secret, write_key

    key = Key(
        new_secret(1), ("qk", "vo"), 4.0, ("*",), Known("model.", {}, {}, frozenset(), {}, {}), {"a": ("01",)}, "x"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_key(Path(folder, "key"), key)
        return [Path(folder, "key").read_bytes()]


def found_seeds() -> list[bytes]:
    from weightsmith.vsa.encode import Encoder
    from weightsmith.vsa.index import Index

    with tempfile.TemporaryDirectory() as folder:
        made = Index.of(Encoder(dim=16), {"a": {"lambda": 0.5}, "b": ["x"]}, {"a": "note"})
        return [made.save(Path(folder, "index")).read_bytes()]


WORDS = {"added_tokens": [{"id": 3, "content": "<s>"}], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}}}
UNIGRAM = {"added_tokens": [], "model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}
LOGGED = [{"step": 10, "loss": 2.5}, {"step": 20, "loss": 2.0, "eval_loss": 2.1}]
QUANTISED = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
MERGEKIT = b"""merge_method: dare_ties
base_model: org/base
models:
  - {model: org/a, parameters: {weight: [0, 0.5, 1], density: {filter: mlp, value: 0.5}}}
  - {model: org/b+org/lora, parameters: {weight: [{filter: mlp, value: 1}, {value: 0.5}]}}
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
tokenizer: {source: union, tokens: {<s>: {source: org/a, force: true}}}
"""
SLICES = b"""merge_method: passthrough
slices:
  - sources: [{model: org/a, layer_range: [0, 4]}]
  - sources: [{model: org/b, layer_range: [2, 6], parameters: {scale: 0.5}}]
"""
MIXTURE = b"""base: org/base
experts: {a: {model: org/a, prompts: [one, two], avoid: [x]}, b: {model: org/b, prompts: [[1, 2]], noise: 0.1}}
router: hidden
experts_per_token: 2
output: {dtype: float16}
"""
MERGEKIT_MOE = b"""base_model: org/base
gate_mode: hidden
experts:
  - {source_model: org/a, positive_prompts: [one], negative_prompts: [two]}
  - {source_model: org/b, positive_prompts: [x]}
"""
ADAPTERS = b"""models:
  a: {model: org/a, weight: 0.5}
  b: org/b
method: {dare_ties: {density: 0.5}}
output: {dtype: float32}
"""
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
    "gguf": gguf_seeds,
    "tokenizer": lambda: [json.dumps(made).encode() for made in (WORDS, UNIGRAM)],
    "trainer": lambda: [json.dumps({"global_step": 20, "log_history": LOGGED}).encode()],
    "mergekit": lambda: [MERGEKIT, SLICES],
    "mixture": lambda: [MIXTURE, MERGEKIT_MOE],
    "adapters": lambda: [ADAPTERS, b"models: [a, b]\nmethod: {knots: {density: 0.5}}\nweights: {a: 1}\n"],
    "stats": stats_seeds,
    "quantised": lambda: [json.dumps({"quantization_config": QUANTISED}).encode()],
    "checkpoint": checkpoint_seeds,
    "key": key_seeds,
    "found": found_seeds,
    "shard": lambda: [json.dumps({"w": {"saved_offsets": [0, 0]}, "s": {"saved_offsets": []}}).encode()],
}  # fmt: skip


# --- the targets -----------------------------------------------------------------------------------


def reads_header(place: Path) -> Callable[[bytes], None]:
    import safetensors

    from weightsmith.io.read.safetensors import parse_header, parse_length

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
    from weightsmith.io.read.folder import parse_index

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

    from weightsmith.io.read.peft import AdapterSource
    from weightsmith.io.read.source import MemorySource

    factors = {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)}
    stored = {f"base_model.model.m.{part}.weight": tensor for part, tensor in factors.items()}
    save_file(stored, place / "adapter_model.safetensors")
    base = MemorySource({"m.weight": torch.zeros(4, 3)})

    def read(data: bytes) -> None:
        (place / "adapter_config.json").write_bytes(data)
        assert AdapterSource(place, base).read("m.weight").shape == (4, 3)

    return read


def reads_card(place: Path) -> Callable[[bytes], None]:
    from weightsmith.io.package.card import licence_problems, licences

    def read(data: bytes) -> None:
        (place / "README.md").write_bytes(data)
        stated = licences({"m": place})
        assert stated["m"].isprintable()
        licence_problems(stated | {"other": "mit"})

    return read


def reads_manifest(place: Path) -> Callable[[bytes], None]:
    from weightsmith.io.package.manifest import verify_folder, write_manifest
    from weightsmith.io.read.open import folder_kind

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
    from weightsmith.io.read.pickle import PickleSource

    def read(data: bytes) -> None:
        (place / "m.bin").write_bytes(data)
        source = PickleSource(place / "m.bin")
        for name in source.keys:
            source.bits(name, 0, 2)

    return read


def reads_gguf(place: Path) -> Callable[[bytes], None]:
    from weightsmith.io.read.gguf import GgufSource

    def read(data: bytes) -> None:
        (place / "m.gguf").write_bytes(data)
        source = GgufSource(place / "m.gguf")
        for name, key in source.keys.items():
            assert source.bits(name, 0, 2).shape == ((min(key.rows, 2), *key.shape[1:]) if key.shape else ())

    return read


def reads_tokenizer(place: Path) -> Callable[[bytes], None]:
    from weightsmith.io.read.vocabulary import difference
    from weightsmith.tokens.match import keys_of
    from weightsmith.tokens.vocabulary import read_tokens, unite

    (place / "other").mkdir(exist_ok=True)
    (place / "other" / "tokenizer.json").write_text(json.dumps(WORDS))

    def read(data: bytes) -> None:
        (place / "tokenizer.json").write_bytes(data)
        difference(place, place / "other")
        found, other = read_tokens(place), read_tokens(place / "other")
        assert other is not None
        if found is not None:
            assert all(isinstance(token, str) and number >= 0 for token, number in found.ids.items())
            keys_of(found)
            unite([(other, 4), (found, 10)])

    return read


def reads_trainer(place: Path) -> Callable[[bytes], None]:
    from weightsmith.io.read.trainer import logged

    (place / "checkpoint-20").mkdir(exist_ok=True)

    def read(data: bytes) -> None:
        (place / "checkpoint-20" / "trainer_state.json").write_bytes(data)
        assert isinstance(logged(place / "checkpoint-20", "loss", since=5), float)

    return read


def reads_mergekit(place: Path) -> Callable[[bytes], None]:
    return reads_recipe(place)


def reads_mixture(place: Path) -> Callable[[bytes], None]:
    from weightsmith.moe.recipe import MoeRecipe, loads

    def read(data: bytes) -> None:
        recipe = loads(data.decode("utf-8", "replace"))
        assert MoeRecipe.model_validate(recipe.model_dump(mode="json", exclude_defaults=True)) == recipe

    return read


def reads_adapters(place: Path) -> Callable[[bytes], None]:
    from weightsmith.lora.recipe import loads, method_of

    def read(data: bytes) -> None:
        method_of(loads(data.decode("utf-8", "replace")))

    return read


def reads_stats(place: Path) -> Callable[[bytes], None]:
    from weightsmith.io.read.stats import open_stats

    def read(data: bytes) -> None:
        (place / "gram.safetensors").write_bytes(data)
        for source in open_stats([place / "gram.safetensors"]).values():
            for name in [*source.keys, *source.aliases]:
                source.bits(name)

    return read


def reads_quantised(place: Path) -> Callable[[bytes], None]:
    import torch
    from safetensors.torch import save_file

    from weightsmith.io.read.open import open_source

    weight = torch.ones(4, 3).to(torch.float8_e4m3fn)
    save_file({"m.weight": weight, "m.weight_scale_inv": torch.ones(1, 1)}, place / "model.safetensors")

    def read(data: bytes) -> None:
        (place / "config.json").write_bytes(data)
        source = open_source(place)
        assert source.read("m.weight").shape == (4, 3)

    return read


def reads_shard(place: Path) -> Callable[[bytes], None]:
    import torch
    from safetensors.torch import save_file

    from weightsmith.io.read.sharded import ShardedSource

    tensors, path = (
        {"w": torch.ones(3, 2), "s": torch.tensor(1.0)},
        place / "shard-00001-model-00001-of-00001.safetensors",
    )

    def read(data: bytes) -> None:
        save_file(tensors, path, {"DCP_SHARDING_INFO": data.decode("utf-8", "replace")})
        source = ShardedSource(place)
        assert source.read("w").shape == (3, 2)

    return read


def reads_checkpoint(place: Path) -> Callable[[bytes], None]:
    import warnings

    import torch
    import torch.distributed.checkpoint as dcp

    from weightsmith.io.read.dcp import DcpSource

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": {"w": torch.ones(3, 2), "n": torch.tensor(1)}}, checkpoint_id=place, no_dist=True)

    def read(data: bytes) -> None:
        (place / ".metadata").write_bytes(data)
        source = DcpSource(place)
        for name in source.keys:
            source.bits(name, 0, 2)

    return read


def reads_key(place: Path) -> Callable[[bytes], None]:
    from weightsmith.protect.key import _sum, read_key

    path = place / "key"
    path.touch(0o600)

    def read(data: bytes) -> None:
        noted = None
        with contextlib.suppress(ValueError, RecursionError):
            noted = json.loads(data)
        if isinstance(noted, dict):  # with a checksum that fits
            noted.pop("sum", None)
            with contextlib.suppress(ValueError, UnicodeEncodeError):
                data = json.dumps({**noted, "sum": _sum(noted)}).encode()
        path.write_bytes(data)
        assert "secret" not in repr(read_key(path))

    return read


def reads_found(place: Path) -> Callable[[bytes], None]:
    from weightsmith.vsa.index import Index

    def read(data: bytes) -> None:
        (place / "index").write_bytes(data)
        found = Index.load(place / "index")
        assert len(found.names) == len(found.vectors)

    return read


TARGETS = {name.removeprefix("reads_"): make for name, make in globals().items() if name.startswith("reads_")}
