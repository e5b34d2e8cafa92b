"""Our reader of safetensors against the reference implementation, and against hostile headers."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file, save_model

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import DTYPES
from weightsmith.io.read.safetensors import MAX_HEADER, SafetensorsSource, parse_header, parse_length, read_header

FOUR = b"\0" * 4


def blob(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


ENTRY = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

# name -> (file, text of our error).  `STRICTER`: the reference accepts these; we do not.
BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", r"0 bytes is too short"),
    "seven bytes": (b"\0" * 7, "too short for a header"),
    "no header": (b"\0" * 8, "not a JSON object"),
    "header longer than the file": (blob({"a": entry()}, FOUR, length=10_000), "truncated in its header"),
    "header over the limit": (blob(b"{}", length=MAX_HEADER + 1), "limit 100000000"),
    "length near 2^64": (blob(b"{}", length=2**64 - 1), "header would be 18446744073709551615 bytes"),
    "a list": (blob([]), "not a JSON object"),
    "not JSON": (blob(b"{abc"), "not valid JSON"),
    "not UTF-8": (blob(b'{"\xff":1}'), "not valid JSON"),
    "byte order mark": (blob(b"\xef\xbb\xbf{}"), "not a JSON object"),
    "text behind": (blob(b'{"a":' + ENTRY + b"} x", FOUR), "not valid JSON"),
    "deep nesting": (blob(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "not valid JSON"),
    "half a character": (blob(b'{"\\ud800":' + ENTRY + b"}", FOUR), "not valid Unicode"),
    "control character": (blob(b'{"a\x01":' + ENTRY + b"}", FOUR), "not valid JSON"),
    "metadata number": (blob({"__metadata__": {"a": 1}, "t": entry()}, FOUR), "'a' is 1, not a string"),
    "metadata list": (blob({"__metadata__": []}), "not a JSON object"),
    "metadata twice": (blob(b'{"__metadata__":{},"__metadata__":{}}'), "names '__metadata__' twice"),
    "missing field": (blob({"a": {"dtype": "F32", "shape": [1]}}, FOUR), "not dtype, shape and data_offsets"),
    "field twice": (blob(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR), "twice"),
    "unknown dtype": (blob({"a": entry(dtype="f32")}, FOUR), r"'a' has dtype 'f32', which cannot be read; known: BF16"),
    "dtype list": (blob({"a": entry(dtype=[])}, FOUR), "dtype"),
    "shape number": (blob({"a": entry(shape=1)}, FOUR), r"'a' has shape 1"),
    "shape float": (blob({"a": entry(shape=[1.0])}, FOUR), "whole numbers"),
    "shape bool": (blob({"a": entry(shape=[True])}, FOUR), "whole numbers"),
    "shape negative": (blob({"a": entry(shape=[-1])}, FOUR), "negative number -1"),
    "minus zero": (blob(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', FOUR), "negative number"),
    "shape object": (blob({"a": entry(shape={})}, FOUR), "whole numbers"),
    "shape beyond 64 bits": (blob({"a": entry(shape=[2**64], data_offsets=[0, 0])}), "no tensor can have"),
    "size overflows": (blob({"a": entry(shape=[2**32, 2**32, 0], data_offsets=[0, 0])}), "no tensor can have"),
    "size wraps to 4": (blob({"a": entry(shape=[2**62 + 1])}, FOUR), "no tensor can have"),
    "offsets wrong way": (blob({"a": entry(data_offsets=[4, 0])}, FOUR), r"not \[begin, end\]"),
    "three offsets": (blob({"a": entry(data_offsets=[0, 4, 4])}, FOUR), r"not \[begin, end\]"),
    "offset exponent": (blob(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4e0]}}', FOUR), "data_offsets"),
    "offset NaN": (blob(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}', FOUR), "NaN"),
    "size lies": (blob({"a": entry(shape=[2])}, FOUR), r"4 bytes of data, but F32 \[2\] needs 8"),
    "beyond the data": (blob({"a": entry(shape=[2], data_offsets=[0, 8])}, FOUR), "only 4 bytes are there"),
    "hole": (blob({"a": entry(), "b": entry(data_offsets=[8, 12])}, FOUR * 3), "'b' begins at 8, .* ends at 4"),
    "hole at first": (blob({"a": entry(data_offsets=[4, 8])}, FOUR * 2), "'a' begins at 4"),
    "overlap": (blob({"a": entry(), "b": entry(data_offsets=[2, 6])}, b"\0" * 6), "'b' overlaps 'a'"),
    "same place": (blob({"a": entry(), "b": entry()}, FOUR), "'b' overlaps 'a'"),
    "empty inside another": (
        blob({"a": entry(shape=[2], data_offsets=[0, 8]), "z": entry(shape=[0], data_offsets=[4, 4])}, FOUR * 2),
        "'z' overlaps 'a'",
    ),
    "bytes behind": (blob({"a": entry()}, FOUR + b"!"), "1 bytes follow the last tensor"),
    "truncated data": (blob({"a": entry()}, FOUR[:3]), "only 3 bytes are there"),
    "a string": (blob({"a": "F32"}), "not a JSON object"),
}
STRICTER: dict[str, tuple[bytes, str]] = {
    "tensor twice": (blob(b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", FOUR), "the header names 'a' twice"),
    "metadata name twice": (blob(b'{"__metadata__":{"a":"1","a":"2"}}'), "__metadata__ names 'a' twice"),
    "unknown field": (blob({"a": entry(extra=1)}, FOUR), "has the fields"),
    "space in front": (blob(b' {"a":' + ENTRY + b"}", FOUR), "not a JSON object"),
    "entry as a list": (blob({"a": ["F32", [1], [0, 4]]}, FOUR), "not a JSON object"),
    "four bits": (blob({"a": entry(dtype="F4", shape=[8])}, FOUR), "'a' has dtype 'F4', which cannot be read"),
    "scales": (blob({"a": entry(dtype="F8_E8M0", shape=[4])}, FOUR), "'a' has dtype 'F8_E8M0'"),
    "complex": (blob({"a": entry(dtype="C64", data_offsets=[0, 8])}, FOUR * 2), "'a' has dtype 'C64'"),
    "an axis beyond 63 bits": (blob({"a": entry(shape=[0, 2**63, 4], data_offsets=[0, 0])}), "no tensor can have"),
    "65 axes": (blob({"a": entry(shape=[1] * 65)}, FOUR), "no tensor can have"),
}
GOOD: dict[str, bytes] = {
    "no tensors": blob({}),
    "metadata null": blob({"__metadata__": None, "a": entry()}, FOUR),
    "spaces behind": blob(b'{"a":' + ENTRY + b"}   ", FOUR),
    "a scalar": blob({"a": entry(shape=[])}, FOUR),
    "an empty tensor": blob({"a": entry(shape=[0], data_offsets=[0, 0])}),
    "an empty tensor between": blob(
        {"a": entry(), "z": entry(shape=[0], data_offsets=[4, 4]), "b": entry(data_offsets=[4, 8])}, FOUR * 2
    ),
    "listed in another order": blob({"b": entry(data_offsets=[4, 8]), "a": entry()}, FOUR * 2),
    "an empty name": blob({"": entry()}, FOUR),
    "a surrogate pair": blob(b'{"\\ud83d\\ude00":' + ENTRY + b"}", FOUR),
    "unaligned": blob({"a": entry(dtype="U8", data_offsets=[0, 1]), "b": entry(data_offsets=[1, 5])}, b"\0" * 5),
}


def reference_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "np") as file:
            file.keys()
    except SafetensorError:
        return False
    return True


@pytest.mark.parametrize("case", BAD)
def test_what_the_reference_refuses_is_refused(case: str, tmp_path: Path) -> None:
    data, text = BAD[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    assert not reference_accepts(path), "the case does not show what it claims"
    with pytest.raises(SourceError, match=text) as error:
        SafetensorsSource(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", STRICTER)
def test_what_only_we_refuse(case: str, tmp_path: Path) -> None:
    data, text = STRICTER[case]
    path = tmp_path / "odd.safetensors"
    path.write_bytes(data)
    assert reference_accepts(path), "the reference refuses this too: move it to BAD"
    with pytest.raises(SourceError, match=text):
        SafetensorsSource(path)


@pytest.mark.parametrize("case", GOOD)
def test_odd_but_valid_files(case: str, tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD[case])
    with safe_open(path, "np") as file:
        expected = {
            name: (tuple(t.get_shape()), t.get_dtype()) for name in list(file.keys()) if (t := file.get_slice(name))
        }
    source = SafetensorsSource(path)
    assert {name: (key.shape, DTYPES[key.dtype].code) for name, key in source.keys.items()} == expected
    for name, key in source.keys.items():
        assert source.bits(name).shape == key.shape


def test_the_largest_header_is_allowed() -> None:
    raw = b"{}" + b" " * 1000
    assert parse_header(raw, 8 + len(raw), "x").tensors == {}
    assert parse_length(struct.pack("<Q", MAX_HEADER), MAX_HEADER + 8, "x") == MAX_HEADER
    with pytest.raises(SourceError, match="limit"):
        parse_length(struct.pack("<Q", MAX_HEADER + 1), MAX_HEADER + 9, "x")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made: dict[str, torch.Tensor] = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False]),
    }
    for dtype in DTYPES:
        bits = torch.randint(0, 255, (7, 5, DTYPES[dtype].itemsize), dtype=torch.uint8, generator=generator)
        made[f"t.{dtype}"] = bits.view(getattr(torch, dtype)).squeeze(-1) if dtype != "bool" else bits[..., 0] > 99
    return made


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
    )


def test_every_dtype_reads_as_the_reference_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    save_file(tensors(), path)
    source, expected = SafetensorsSource(path), load_file(path)
    assert set(source.keys) == set(expected)
    for name, tensor in expected.items():
        assert same_bits(source.read(name), tensor)
        assert source.bits(name).dtype.kind == "u"


def test_rows_are_slices(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    weight = torch.arange(60, dtype=torch.int32).reshape(10, 2, 3)
    save_file({"before": torch.zeros(3), "w": weight}, path)
    source = SafetensorsSource(path)
    for start, stop in ((0, None), (3, 7), (0, 10), (9, 10), (4, 4), (8, 99), (7, 3)):
        assert source.read("w", start, stop).equal(weight[start:stop])
    assert source.bits("w", 2, 5).flags.writeable


def test_tied_tensors_that_save_model_left_out(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_model(model, str(tmp_path / "m.safetensors"))
    source = SafetensorsSource(tmp_path / "m.safetensors")
    assert source.aliases == {"1.weight": "0.weight"}
    assert source.read("1.weight").equal(model[0].weight)


def test_an_unknown_name_is_told_with_its_neighbour(tmp_path: Path) -> None:
    save_file({"model.weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(SourceError, match=r"no tensor 'model\.wieght'; did you mean 'model\.weight'\?"):
        SafetensorsSource(tmp_path / "m.safetensors").bits("model.wieght")


def test_a_source_survives_pickling_and_tells_files_apart(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(3)}, path)
    source = SafetensorsSource(path)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read("w").equal(torch.ones(3))
    assert copy.fingerprint() == source.fingerprint()
    (name, facts), *_ = source.fingerprint()["files"].items()
    assert name == "m.safetensors"
    assert facts["size"] == path.stat().st_size
    before = source.fingerprint()
    assert json.dumps(before)
    save_file({"v": torch.ones(3)}, path)
    assert SafetensorsSource(path).fingerprint() != before
    with pytest.raises(SourceError, match="changed or exchanged since it was opened"):
        source.fingerprint()


def test_only_the_header_is_read_to_list_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightsmith.io.read import files

    path = tmp_path / "m.safetensors"
    save_file({"w": torch.ones(100_000)}, path)
    real, read = files.preadv, []

    def counted(fd: int, buffer: memoryview, offset: int) -> int:
        read.append(len(buffer))
        return real(fd, buffer, offset)

    monkeypatch.setattr(files, "preadv", counted)
    source = SafetensorsSource(path)
    assert sum(read) == read_header(path).size < 200
    read.clear()
    source.bits("w", 10, 20)
    assert read == [40]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_random_bytes_give_only_source_errors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data)
    opened(path)  # no other exception


VALID = blob(
    {"__metadata__": {"format": "pt"}, "a.b": entry(shape=[2], data_offsets=[0, 8]), "c": entry(data_offsets=[8, 12])},
    FOUR * 3,
)


def opened(path: Path) -> tuple[SafetensorsSource | None, str]:
    try:
        return SafetensorsSource(path), ""
    except SourceError as error:
        return None, str(error)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_mutated_files_are_refused_or_safe_to_read(tmp_path: Path, changes: list[tuple[int, int]], data: Any) -> None:
    mutated = bytearray(VALID)
    for at, byte in changes:
        mutated[at] = byte
    cut = data.draw(st.integers(0, 3))
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(bytes(mutated[: len(mutated) - cut]))
    source, text = opened(path)
    assert "\n" not in text
    if source is None:
        return
    assert reference_accepts(path), "we accept what the reference refuses"
    for name, key in source.keys.items():
        assert source.bits(name).shape == key.shape


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    ),
    st.integers(0, 64),
)
def test_random_json_gives_only_source_errors(value: object, data_size: int) -> None:
    raw = json.dumps({"a": value}).encode()
    with contextlib.suppress(SourceError):
        parse_header(raw, 8 + len(raw) + data_size, "x")


def test_bits_match_numpy(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, -2.0], dtype=torch.bfloat16)}, tmp_path / "m.safetensors")
    assert SafetensorsSource(tmp_path / "m.safetensors").bits("w").tolist() == [0x3F80, 0xC000]
    assert SafetensorsSource(tmp_path / "m.safetensors").bits("w").dtype == np.uint16
