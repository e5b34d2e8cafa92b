"""Weight files, indexes and folders that lie: refused with one line, in bounded time and memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import outcome
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from weightsmith.core.errors import OutputError, SourceError
from weightsmith.core.keys import Key
from weightsmith.io.read.folder import FolderSource, parse_index
from weightsmith.io.read.open import folder_kind, open_source
from weightsmith.io.read.safetensors import MAX_HEADER, MAX_NOTES, MAX_PARTS, MAX_WIDE, SafetensorsSource, parse_header
from weightsmith.io.write.layout import plan_shards

BOUND = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def blob(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def refused(open_it: Callable[[], Any], text: str | None = None) -> str:
    with pytest.raises(SourceError, match=text) as error:
        open_it()
    said = str(error.value)
    assert said.isprintable()
    assert len(said) < 1000
    return said


def reference_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "np") as file:
            for name in list(file.keys()):
                file.get_slice(name).get_shape()
    except (SafetensorError, OSError, ValueError, OverflowError):
        return False
    return True


# --- safetensors headers ---------------------------------------------------------------------------

ENTRY = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
NAMES = ["a\\nb", "a\\u001b[31m", "a\\u202eb", "a\\u0000", "\\u007f", "\\u2028", "x" * 1001, "\\ue000"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_could_drive_a_terminal_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(blob(b'{"' + name.encode() + b'":' + ENTRY + b"}", b"!"))
    refused(lambda: SafetensorsSource(path), "no name for a tensor")
    path.write_bytes(blob(b'{"__metadata__":{"' + name.encode() + b'":"a"},"a":' + ENTRY + b"}", b"!"))
    refused(lambda: SafetensorsSource(path), "no name for a tensor")


def test_messages_stay_short_whatever_the_header_holds(tmp_path: Path) -> None:
    long = "x" * 500_000
    spoilt: list[dict[str, Any]] = [
        {"a": {"dtype": long, "shape": [1], "data_offsets": [0, 1]}},
        {"a": {"dtype": "U8", "shape": [long], "data_offsets": [0, 1]}},
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [long]}},
        {"a": {"dtype": "U8", "shape": [1], long: [0, 1]}},
        {"__metadata__": {long: 3}},
        {long: 3},
    ]
    for header in spoilt:
        raw = json.dumps(header).encode()
        refused(lambda raw=raw: parse_header(raw, 8 + len(raw) + 1, "x"))
    entry = b'"' + b"x" * 1000 + b'":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    twice = b"{" + entry + b"," + entry + b"}"
    refused(lambda: parse_header(twice, 8 + len(twice), "x"), "twice")


LARGE = {
    "spaces": b" ",
    "braces": b"{",
    "brackets": b"[",
    "quotes": b'"',
    "numbers": b"9",
    "zeros in a list": b"0,",
    "backslashes": b"\\",
    "not UTF-8": b"\xff",
}


@pytest.mark.parametrize("filling", LARGE)
def test_a_large_header_takes_bounded_time_and_memory(filling: str) -> None:
    piece = LARGE[filling]
    size = MAX_HEADER // 20
    raw = b'{"a":[' + piece * (size // len(piece))
    tracemalloc.start()
    try:
        began = time.perf_counter()
        refused(lambda: parse_header(raw, 8 + len(raw), "x"))
        seconds = time.perf_counter() - began
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * size
    assert seconds < 30  # tracing makes it ten times slower


TRAPS = {
    "empty objects": b"{},",
    "numbers": b"1,",
    "pairs": b'"":0,',
    "lists": b"[],",
    "tensors": b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},',
    **LARGE,
}


@pytest.mark.parametrize("filling", TRAPS)
def test_a_header_of_the_full_100_mb(filling: str) -> None:
    """Without tracing: what would be millions of objects is counted before it is parsed."""
    piece = TRAPS[filling]
    raw = b'{"a":[' + piece * ((MAX_HEADER - 6) // len(piece))
    began = time.process_time()
    refused(lambda: parse_header(raw, 8 + len(raw), "x"))
    assert time.process_time() - began < 5


def test_the_most_parts_that_are_parsed() -> None:
    inner = b",".join([b"{}"] * (MAX_PARTS // 2 - 3))
    raw = b'{"a":[' + inner + b"]}"
    refused(lambda raw=raw: parse_header(raw, 8 + len(raw), "x"), "not a JSON object")
    raw = b'{"a":[' + inner + b",{},{},{},{}]}"
    refused(lambda: parse_header(raw, 8 + len(raw), "x"), f"limit {MAX_PARTS}")


def many(count: int) -> bytes:
    entries = (b'"%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(count))
    return b"{" + b",".join(entries) + b"}"


def noted(value: bytes) -> bytes:
    return b'{"__metadata__":{' + value + b'},"a":' + ENTRY + b"}"


TENSORS = MAX_PARTS // 7 - 1
TOO_MUCH: dict[str, tuple[Callable[[], bytes], str]] = {
    "tensors": (lambda: b'{"a":' + ENTRY + b"".join([b',"a":' + ENTRY] * (TENSORS + 2)) + b"}", f"limit {MAX_PARTS}"),
    "notes": (lambda: noted(b'"a":"b",' * MAX_NOTES + b'"a":"b"'), f"limit {MAX_NOTES}"),
    "notes up to the parts": (lambda: noted(b'"a":"b",' * (MAX_PARTS - 20) + b'"a":"b"'), f"limit {MAX_NOTES}"),
    "wide": (lambda: noted(b'"a":"\xf0\x9f\x98\x80' + b"x" * MAX_WIDE + b'"'), f"limit {MAX_WIDE}"),
    "escapes": (lambda: noted(b'"a":"\\ud83d\\ude00' + b"x" * MAX_WIDE + b'"'), f"limit {MAX_WIDE}"),
}
MOST: dict[str, Callable[[], bytes]] = {
    "tensors": lambda: many(TENSORS),
    "one note": lambda: noted(b'"a":"' + b"x" * (MAX_HEADER - 100) + b'"'),
    "one wide note": lambda: noted(b'"a":"\xf0\x9f\x98\x80' + b"x" * (MAX_WIDE - 100) + b'"'),
}
MEASURE = """
import resource, sys, time
from pathlib import Path
from weightsmith.io.read.safetensors import parse_header
raw = Path(sys.argv[1]).read_bytes()
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
found = parse_header(raw, 8 + len(raw) + int(sys.argv[2]), "x")
seconds = time.process_time() - began
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3, len(found.tensors))
"""


@pytest.mark.parametrize("case", TOO_MUCH)
def test_headers_that_are_larger_than_any_models_are_refused_soon(case: str) -> None:
    make, text = TOO_MUCH[case]
    raw = make()
    began = time.process_time()
    refused(lambda: parse_header(raw, 8 + len(raw) + 1, "x"), text)
    assert time.process_time() - began < 6


@pytest.mark.parametrize("case", MOST)
def test_the_largest_headers_that_are_read_take_bounded_time_and_memory(case: str, tmp_path: Path) -> None:
    """In a process of its own, whose largest size is that of the parsing: 5 s and 200 MB were measured."""
    (tmp_path / "raw").write_bytes(MOST[case]())
    count = TENSORS if case == "tensors" else 1
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "raw"), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, megabytes, tensors = map(float, done.stdout.split())
    assert tensors == count
    assert seconds < 15
    assert megabytes < 400


def test_no_file_is_written_that_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [Key(str(i), (1,), "uint8") for i in range(4)]
    monkeypatch.setattr("weightsmith.io.write.layout.MAX_PARTS", 7 * len(keys))  # a brace, and no comma behind the last
    plan_shards(keys, 1 << 40, "model", {})
    with pytest.raises(OutputError, match="choose a smaller shard_size"):
        plan_shards([*keys, Key("more", (1,), "uint8")], 1 << 40, "model", {})


def test_a_header_above_the_limit_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightsmith.io.read import files

    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)  # sparse
    read: list[int] = []
    real = files.preadv
    monkeypatch.setattr(files, "preadv", lambda fd, b, at: (read.append(len(b)), real(fd, b, at))[1])
    refused(lambda: SafetensorsSource(path), "limit 100000000")
    assert read == [8]


SMALL_INTS = st.one_of(st.integers(-2, 12), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 2**64 + 4, 10**30]))
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F64", "BOOL", "f32", "F4", "", "I64"]),
        "shape": st.lists(SMALL_INTS, max_size=3),
        "data_offsets": st.lists(SMALL_INTS, min_size=1, max_size=3),
    }
)


@settings(max_examples=200, **BOUND)
@given(st.data())
def test_whatever_the_library_refuses_we_refuse(tmp_path: Path, data: Any) -> None:
    """Headers that are nearly right: tensors laid end to end, then a few fields changed."""
    at, header = 0, {}
    for i, (code, width, shape) in enumerate(
        data.draw(
            st.lists(
                st.tuples(
                    st.sampled_from(["F32", "BF16", "U8", "F64"]), st.just(0), st.lists(st.integers(0, 3), max_size=3)
                ),
                max_size=4,
            )
        )
    ):
        width = {"F32": 4, "BF16": 2, "U8": 1, "F64": 8}[code]
        size = width
        for n in shape:
            size *= n
        header[f"t{i}"] = {"dtype": code, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), max_size=2)) if header else []:
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        header[name] = header[name] | {field: data.draw(ENTRIES)[field]}
    if data.draw(st.booleans()):
        header["__metadata__"] = data.draw(
            st.dictionaries(st.sampled_from(["a", "t0"]), st.sampled_from(["t1", "x", 1, None]), max_size=2)
        )
    extra = data.draw(st.integers(-1, 1))
    path = tmp_path / "m.safetensors"
    path.write_bytes(blob(json.dumps(header).encode(), bytes(max(at + extra, 0))))
    source, _ = outcome(lambda: SafetensorsSource(path))
    if source is None:
        return
    assert reference_accepts(path), "we accept what the library refuses"
    for name, key in source.keys.items():
        assert source.bits(name).shape == key.shape


# --- folders and indexes ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    save_file({"a": torch.ones(2)}, place / "one.safetensors")
    return place


def index(folder: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps({"weight_map": content})
    (folder / "model.safetensors.index.json").write_text(text)


def test_an_index_that_names_an_index(folder: Path) -> None:
    index(folder, {"a": "model.safetensors.index.json"})
    refused(lambda: FolderSource(folder), "not a safetensors file|header")


def test_links_in_circles(folder: Path) -> None:
    for name in ("x", "y"):
        (folder / name).symlink_to(folder / {"x": "y", "y": "x"}[name])
    (folder / "x.safetensors").symlink_to(folder / "x")
    index(folder, {"a": "x.safetensors"})
    refused(lambda: FolderSource(folder))
    (folder.parent / "loop").symlink_to(folder.parent / "loop")
    refused(lambda: open_source(folder.parent / "loop"))


@pytest.mark.parametrize(
    "name", ["../model/one.safetensors", "/dev/stdin", ".", "one.safetensors/", "a\x1b", "x" * 2000]
)
def test_an_index_names_files_of_its_folder_only(name: str, folder: Path) -> None:
    index(folder, {"a": name})
    refused(lambda: FolderSource(folder), "not a file name inside the folder")


@pytest.mark.parametrize("file", ["model.safetensors.index.json", "one.safetensors", "config.json", "weightsmith.json",
                                  "adapter_config.json", "modules.json"])  # fmt: skip
def test_pipes_and_devices_are_not_waited_for(file: str, folder: Path) -> None:
    index(folder, {"a": "one.safetensors"})
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    source, said = outcome(lambda: open_source(folder, base=open_source({"a": torch.ones(2)})))
    assert "not a regular file" in said if source is None else source.read("a").tolist() == [1, 1]
    (folder / file).unlink()
    (folder / file).symlink_to("/dev/zero")  # endless
    source, said = outcome(lambda: open_source(folder, base=open_source({"a": torch.ones(2)})))
    if source is None:
        assert "not a regular file" in said or "leaves the folder" in said
    else:
        assert source.read("a").tolist() == [1, 1]


def test_a_manifest_of_any_content_only_tells_the_kind(folder: Path) -> None:
    for text in ("", "[" * 100_000, '{"kind": 3}', '{"kind": "x", "kind": "codec"}', "\xff", "NaN", '{"a":' * 99_999):
        (folder / "weightsmith.json").write_text(text, encoding="latin-1")
        assert folder_kind(folder) is None


@settings(max_examples=300, **BOUND)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["weight_map", "metadata", "a", "b"]) | st.text(max_size=3), inner, max_size=3
            )
        ),
        max_leaves=10,
    )
)
def test_any_json_as_an_index(value: object) -> None:
    for content in (value, {"weight_map": value}):
        named, _ = outcome(lambda content=content: parse_index(json.dumps(content).encode(), "x"))
        assert all("/" not in file and file not in ("", ".", "..") for file in (named or {}).values())


@pytest.mark.parametrize(
    "ref", ["~nosuchuserhere/model", "a" * 5000, "b/" + "a" * 5000, "a\0b", "", " ", "\x1b[2J", "hf://../..", "a//b"]
)
def test_paths_that_are_none(ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError) as error:
        open_source(ref)
    assert len(str(error.value)) < 1000
    with pytest.raises(SourceError):
        open_source(Path(ref or "x/" * 3000))
