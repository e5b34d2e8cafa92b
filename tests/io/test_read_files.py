"""Byte ranges of files: short reads, faults, changed files, threads, forks, pickles."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightsmith.core.errors import SourceError
from weightsmith.io.read import files
from weightsmith.io.read.files import File

DATA = bytes(range(256)) * 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "x.bin"
    place.write_bytes(DATA)
    return place


def test_ranges_are_read_into_memory_of_their_own(path: Path) -> None:
    file = File(path)
    data = file.read(100, 1000)
    assert data.tobytes() == DATA[100:1100]
    assert data.flags.writeable
    assert data.flags.owndata
    assert file.read(len(DATA), 0).size == 0


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files.preadv
    monkeypatch.setattr(files, "preadv", lambda fd, buffer, offset: whole(fd, buffer[:7], offset))
    assert File(path).read(3, 1000).tobytes() == DATA[3:1003]


def test_ranges_outside_the_file_are_refused(path: Path) -> None:
    for offset, count in ((len(DATA), 1), (0, len(DATA) + 1), (-1, 2)):
        with pytest.raises(
            SourceError, match=r"x\.bin: 'w': bytes .* outside the file \(10240 bytes\); it is truncated"
        ):
            File(path).read(offset, count, "'w'")


def test_a_file_that_is_cut_while_in_use(path: Path) -> None:
    file = File(path)
    file.read(0, 10)  # the descriptor stays open
    os.truncate(path, 5000)
    with pytest.raises(SourceError, match=r"x\.bin: the file ends 5240 bytes early"):
        file.read(0, len(DATA))


def test_a_file_that_was_exchanged_before_its_first_read(path: Path) -> None:
    file = File(path)
    path.write_bytes(DATA[:-1])
    with pytest.raises(SourceError, match="has changed since it was opened"):
        file.read(0, 10)


def test_an_input_output_error_names_the_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, buffer: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "preadv", broken)
    with pytest.raises(SourceError, match=r"x\.bin: 'w': reading 4 bytes at 8 failed \(Input/output error\)"):
        File(path).read(8, 4, "'w'")


@pytest.mark.parametrize(
    ("name", "text"), [("none", "No such file"), (".", "not a regular file"), ("a\0b", "cannot be read")]
)
def test_what_is_no_file(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(SourceError, match=text):
        File(tmp_path / name)


def test_a_pickled_file_reads_on(path: Path) -> None:
    file = File(path)
    file.read(0, 1)
    copy = pickle.loads(pickle.dumps(file))
    assert copy.read(5, 5).tobytes() == DATA[5:10]
    path.write_bytes(DATA + b"!")
    with pytest.raises(SourceError, match="has changed"):
        pickle.loads(pickle.dumps(file)).read(5, 5)


def test_threads_share_a_file(path: Path) -> None:
    file = File(path)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: file.read(i * 10, 10).tobytes(), range(1024)))
    assert b"".join(parts) == DATA


def test_few_descriptors_stay_open_and_none_of_what_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_IDLE", 5)
    opened = []
    for i in range(20):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 10)
        opened.append(File(tmp_path / str(i)))

    def open_here() -> int:
        links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]  # noqa: PTH208
        return sum(str(tmp_path) in link for link in links)

    for _ in range(2):
        assert [int(file.read(3, 1)[0]) for file in opened] == list(range(20))
    assert 1 <= open_here() <= 5
    opened.clear()
    gc.collect()
    assert open_here() == 0


def test_a_collection_during_a_read_does_not_deadlock() -> None:
    idle = files._Idle()
    reader, writer = os.pipe()
    os.close(writer)
    idle.put(7, reader)
    with idle._lock:
        idle.drop(7)  # what the garbage collector does to a thread inside take or put
    idle.put(8, os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
    idle.drop(8)


def test_a_forked_child_reads(path: Path) -> None:
    file = File(path)
    file.read(0, 1)
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with files._idle._lock:
            held.set()
            go.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    # A fork while another thread holds the lock must not leave the child waiting for it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process with threads is the point here
        child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if np.array_equal(file.read(0, 10), np.arange(10)) else 1)
    go.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_disk_is_asked_for_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading block by block: advice in few calls, without gaps, ahead of every block, never beyond the file."""
    monkeypatch.setattr("weightsmith.io.read.files._AHEAD", 1000)
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 40)
    asked: list[tuple[int, int]] = []
    cold = True

    def call(function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if function is os.posix_fadvise:
            asked.append((args[1], args[1] + args[2]))
            return None
        if cold and function is os.preadv and len(args) == 4:
            raise BlockingIOError
        return function(*args, **kwargs)

    monkeypatch.setattr("weightsmith.io.system.call", call)
    file = File(path)
    whole = b""
    for offset in range(0, file.size, 64):
        whole += file.read_on(offset, min(64, file.size - offset)).tobytes()
        assert max(stop for _, stop in asked) >= min(offset + 64 + 500, file.size)
    assert whole == path.read_bytes()
    assert asked[0][0] == 64
    assert [start for start, _ in asked[1:]] == [stop for _, stop in asked[:-1]]
    assert asked[-1][1] == file.size
    assert len(asked) <= 2 * file.size // 1000 + 2
    before = len(asked)
    file.read_on(0, 64)  # from the start again, as the next pass does
    assert asked[before:] == [(64, 1064)]
    file.read(128, 64)
    assert len(asked) == before + 1, "single reads (headers) announce nothing"
    cold = False
    assert File(path).read_on(0, 64).tobytes() == whole[:64]
    assert len(asked) == before + 1, "what is in memory needs no advice"


def test_a_disk_that_takes_no_advice_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)))

    def call(function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if function is os.posix_fadvise or (function is os.preadv and len(args) == 4):
            raise OSError(22, "Invalid argument")
        return function(*args, **kwargs)

    monkeypatch.setattr("weightsmith.io.system.call", call)
    assert File(path).read_on(3, 5).tolist() == [3, 4, 5, 6, 7]
