"""Pickles from strangers: nothing in them is run, whatever they call and however it is written."""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hostile_pickles as hostile
import pytest
import torch

from weightsmith.core.errors import SourceError
from weightsmith.io.read.open import open_source
from weightsmith.io.read.pickle import PickleSource

_SEEN: list[str] = []
_WATCHED = {
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "shutil.rmtree"),
    *("subprocess.Popen", "socket.connect", "socket.getaddrinfo", "urllib.Request", "webbrowser.open"),
    *("ctypes.dlopen", "pickle.find_class"),
}
_watching = False


def _hook(event: str, arguments: object) -> None:
    if _watching and event in _WATCHED:
        _SEEN.append(event)


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[str]]:
    """The interpreter's own record of what is run, spawned, removed or connected to."""
    global _watching  # noqa: PLW0603  (an audit hook cannot be taken back, only told to look away)
    _SEEN.clear()
    _watching = True
    try:
        yield _SEEN
    finally:
        _watching = False


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    torch.save({}, tmp_path / "warm.pt")  # what torch imports on first use is not the pickle's doing
    with pytest.raises(SourceError):
        PickleSource(tmp_path / "warm.pt")
    return tmp_path / "canary"


def refused(path: Path, canary: Path) -> str:
    with watched() as seen, pytest.raises(SourceError) as error:
        open_source(path)
    assert not seen
    assert not canary.exists()
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_the_corpus_would_run_something(canary: Path) -> None:
    """The watchers see what they are there for."""
    stream = hostile.dumped(hostile.call("posix system", (f"touch {canary}",)), 2)
    with watched() as seen:
        pickle.loads(stream)
    assert canary.exists()
    assert {"pickle.find_class", "os.system"} <= set(seen)


@pytest.mark.parametrize("protocol", hostile.PROTOCOLS)
def test_calls_are_refused_and_not_run(protocol: int, tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "model.bin"
    for data in hostile.corpus(canary, protocol):
        path.write_bytes(data)
        refused(path, canary)


@pytest.mark.parametrize("stream", hostile.streams(Path("x")))
def test_unusual_opcodes(stream: str, tmp_path: Path, canary: Path) -> None:
    for kind, data in hostile.files(hostile.streams(canary)[stream]):
        path = tmp_path / f"{kind.replace(' ', '_')}.pt"
        path.write_bytes(data)
        refused(path, canary)


def test_a_call_is_named(tmp_path: Path, canary: Path) -> None:
    stream = hostile.dumped({"x": hostile.call("os system", ("true",))}, 2)
    path = tmp_path / "m.pt"
    path.write_bytes(dict(hostile.files(stream))["zip 0"])
    assert "asks for code (os.system), which is never run" in refused(path, canary)


def test_a_shard_and_an_adapter_are_read_as_strictly(tmp_path: Path, canary: Path) -> None:
    stream = hostile.dumped({"x": hostile.call("os system", (f"touch {canary}",))}, 2)
    data = dict(hostile.files(stream))["zip 0"]
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "pytorch_model-1.bin").write_bytes(data)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "pytorch_model-1.bin"}}')
    with pytest.raises(SourceError, match=r"os\.system"):
        open_source(folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.bin").write_bytes(data)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    with pytest.raises(SourceError, match=r"os\.system"):
        open_source(adapter, base=open_source({"w": torch.zeros(2, 2)}))
    assert not canary.exists()


# --- tensors that lie about their size -------------------------------------------------------------

LIES = {
    "beyond its storage": ((1000,), (1,), 0),
    "far beyond its storage": ((10**10,), (1,), 0),
    "offset beyond its storage": ((2,), (1,), 100),
    "negative offset": ((4,), (1,), -3),
    "negative stride": ((4,), (-1,), 3),
    "size overflows": ((2**62, 2**62), (1, 1), 0),
    "one number shown a thousand million times": ((10**9,), (0,), 0),
    "four petabytes of one number": ((2**40, 2**10), (0, 0), 0),
    "rows that overlap": ((1000, 4), (0, 1), 0),
}


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("lie", LIES)
def test_a_tensor_larger_than_its_file(lie: str, modern: bool, tmp_path: Path) -> None:
    size, stride, offset = LIES[lie]
    path = tmp_path / "m.pt"
    hostile.rebuilt(size, stride, offset)(path, modern)
    with pytest.raises(SourceError) as error:
        open_source(path)
    assert "\n" not in str(error.value)


def test_a_small_expanded_tensor_is_fine(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3.0).expand(2, 3)}, tmp_path / "m.pt")
    assert open_source(tmp_path / "m.pt").read("w").tolist() == [[0, 1, 2], [0, 1, 2]]


def test_compressed_parts_are_refused(tmp_path: Path) -> None:
    """They cannot be mapped: the compressed bytes would be taken for numbers."""
    torch.save({"w": torch.arange(100.0), "z": torch.rand(4000)}, tmp_path / "m.pt")
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as archive,
        zipfile.ZipFile(tmp_path / "c.pt", "w") as packed,
    ):
        for entry in archive.infolist():
            kind = zipfile.ZIP_DEFLATED if entry.filename.endswith("data/0") else zipfile.ZIP_STORED
            packed.writestr(entry.filename, archive.read(entry), kind)
    with pytest.raises(SourceError, match=r"c\.pt: .* is compressed"):
        open_source(tmp_path / "c.pt")


def test_names_that_could_drive_a_terminal_are_refused(tmp_path: Path) -> None:
    for name in ("a\nb", "a\x1b[2Jb", "a\u202eb", "\0", "x" * 5000):
        torch.save({name: torch.zeros(1)}, tmp_path / "m.pt")
        with pytest.raises(SourceError, match=r"m\.pt: .* is no name for a tensor") as error:
            open_source(tmp_path / "m.pt")
        assert len(str(error.value)) < 500
