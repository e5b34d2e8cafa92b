"""The kept machine code of the kernels is executed: only what is whole and the user's own counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from weightsmith.kernels import native
from weightsmith.kernels.linked import address_of
from weightsmith.kernels.record import F32


@pytest.fixture(scope="module")
def kept() -> Path:
    """The file of this version and machine, made if need be."""
    assert native.kernels() is not None
    file = native._file()
    assert file is not None
    assert native._read(file)
    return file


@pytest.fixture
def own(kept: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it."""
    (tmp_path / "cache").mkdir(mode=0o700)
    copy = tmp_path / "cache" / kept.name
    copy.write_bytes(kept.read_bytes())
    copy.chmod(0o600)
    yield copy
    (tmp_path / "cache").chmod(0o700)


def sealed(body: bytes) -> bytes:
    return xxhash.xxh3_128(body).digest() + body


def lies(whole: bytes) -> dict[str, bytes]:
    """Files in place of the right one: some with a checksum that fits."""
    body = whole[16:]
    head, _, rest = body.partition(b"\n")
    table = json.loads(head)
    first = next(iter(table))
    return {
        "nothing": b"",
        "cut": whole[:-1000],
        "a bit": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "zeros at the end": whole[:-4096] + bytes(4096),
        "no table": sealed(b"\xff\xfe"),
        "a table of another kind": sealed(b"[1, 2]\n" + rest),
        "an entry of another kind": sealed(json.dumps(table | {first: 7}).encode() + b"\n" + rest),
        "a kernel is missing": sealed(
            json.dumps({k: v for k, v in table.items() if k != first}).encode() + b"\n" + rest
        ),
        "less code than said": sealed(head + b"\n" + rest[:-100]),
        "a negative length": sealed(json.dumps(table | {first: [table[first][0], -1]}).encode() + b"\n" + rest),
    }


def test_what_is_not_whole_is_not_run(own: Path) -> None:
    for what, data in lies(own.read_bytes()).items():
        own.write_bytes(data)
        assert native._read(own) is None, what


@pytest.mark.parametrize("what", ["nothing", "a bit", "a kernel is missing"])
def test_what_is_not_whole_is_made_again(own: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    code = native._read(own)
    own.write_bytes(lies(own.read_bytes())[what])
    monkeypatch.setenv("WEIGHTSMITH_CACHE", str(own.parent))
    compiled: list[str] = []
    monkeypatch.setattr(native, "announce", compiled.append)
    monkeypatch.setattr(native, "_compiled", lambda: code)
    for _ in range(2):
        found = native.kernels.__wrapped__()
        assert found.keys() == code.keys()
        assert native._read(own) == code
        assert [path.name for path in own.parent.iterdir()] == [own.name]
    assert len(compiled) == 1


def test_a_folder_that_cannot_be_written(own: Path, kept: Path, tmp_path: Path) -> None:
    """The user's temporary folder stands in; where there is none either, the code is compiled and not kept."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    environment = {"WEIGHTSMITH_CACHE": str(blocked / "cache"), "TMPDIR": str(tmp_path)}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        native.tempfile.tempdir = None
        assert native.cache_folder() == tmp_path / f"weightsmith-{os.getuid()}"
        (tmp_path / f"weightsmith-{os.getuid()}").rmdir()
        (tmp_path / f"weightsmith-{os.getuid()}").symlink_to(tmp_path)  # of somebody else, it might be
        assert native.cache_folder() is None
    finally:
        native.tempfile.tempdir = None
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_a_cache_that_fails_is_no_failure(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = native._read(own)
    assert code is not None
    for call in ("mkstemp", "fdopen"):
        with monkeypatch.context() as patch:

            def full(*args: object, **kwargs: object) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(native.tempfile if call == "mkstemp" else native.os, call, full)
            native._keep(own, code)
        assert [path.name for path in own.parent.iterdir()] == [own.name]
    assert native._read(own) == code


def test_two_that_compile_at_once(own: Path, kept: Path) -> None:
    """Each writes a file of its own and renames it: whoever looks finds nothing or all of it."""
    code = native._read(kept)
    assert code is not None
    own.unlink()
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                for _ in range(20):
                    native._keep(own, code)
                    assert native._read(own) == code
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert [path.name for path in own.parent.iterdir()] == [own.name]


def called(kernel: str, address: int) -> np.ndarray:
    """What a kernel that measures finds in fixed numbers."""
    values = np.random.default_rng(0).standard_normal((2, 8, 700)).astype(np.float32)
    found, room, wide = np.zeros(5600), np.zeros(1 << 16, np.float32), np.zeros(1 << 12)
    call, kinds = native._callable(kernel, address), np.full(2, F32, np.int64)
    inputs = np.array([one.ctypes.data for one in values], np.int64)
    rest = (found.ctypes.data, *values[0].shape, room.ctypes.data, wide.ctypes.data)
    if kernel == "row_products":
        call(inputs.ctypes.data, kinds.ctypes.data, 2, 0, F32, 0, *rest)
    else:
        call(int(inputs[0]), F32, *rest)
    return found


def test_both_linkers_give_the_same_kernels(kept: Path) -> None:
    """`linked` where it can; LLVM's on other machines."""
    code, stubs = native._read(kept), dict.fromkeys(native._NEVER, 1)
    assert code is not None
    llvm, machine = native._llvm()
    native._addresses(code)
    for kernel in ("row_products", "row_sizes"):
        found = address_of(*code[kernel], stubs)
        assert found is not None
        ours, theirs = called(kernel, found), called(kernel, native._loaded(llvm, machine, *code[kernel]))
        assert np.array_equal(ours, theirs)
        assert np.count_nonzero(ours) >= 8


def test_what_needs_a_linker_is_left_to_one(kept: Path) -> None:
    code, stubs = native._read(kept), dict.fromkeys(native._NEVER, 1)
    assert code is not None
    symbol, binary = code["magnitudes"]
    machine = binary[:18] + (183).to_bytes(2, "little") + binary[20:]  # aarch64
    relocation = binary.replace((1).to_bytes(4, "little"), (2).to_bytes(4, "little"))
    for what, found in {
        "another machine": address_of(symbol, machine, stubs),
        "relative addresses": address_of(symbol, relocation, stubs),
        "an unknown name": address_of(symbol, binary, {}),
        "no such function": address_of("other", binary, stubs),
    }.items():
        assert found is None, what


def test_llvm_links_what_is_left_to_it(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = native._read(kept)
    assert code is not None
    monkeypatch.setattr(native, "address_of", lambda *_: None)
    assert called("row_sizes", native._addresses(code)["row_sizes"])[:8].all()
