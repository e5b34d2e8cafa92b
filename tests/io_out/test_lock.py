"""One run per output folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from weightsmith.core.errors import OutputError
from weightsmith.io.write.lock import FolderLock, holder

HOLD = (
    "import sys; from pathlib import Path; from weightsmith.io.write.lock import FolderLock\n"
    "FolderLock(Path(sys.argv[1]), Path('x')).acquire(); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "merged.partial.lock"


@pytest.fixture
def other(path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_holds_it(path, other):
    lock = FolderLock(path, path.parent / "merged")
    who = rf"process {other.pid} on host {socket.gethostname()} since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    with pytest.raises(OutputError, match=rf"merged is in use by {who}.*; wait for it to end, or stop it"):
        lock.acquire()
    assert not lock.held
    assert f"process {other.pid}" in holder(path)


def test_the_lock_goes_with_its_process(path, other):
    other.kill()
    other.wait()
    assert path.exists()
    assert holder(path) is None
    lock = FolderLock(path, path)
    lock.acquire()
    assert f"process {os.getpid()} " in holder(path)
    lock.release()


def test_release_removes_the_file_and_may_be_repeated(path):
    lock = FolderLock(path, path)
    lock.acquire()
    lock.release()
    lock.release()
    assert not path.exists()
    assert holder(path) is None
    lock.acquire()
    assert lock.held
    lock.release()


def test_a_file_removed_while_waiting_is_not_mistaken_for_the_lock(path, monkeypatch):
    """Two runs start as a third ends: one locks the removed file, and must not believe it holds the folder."""
    import fcntl

    real, seen = fcntl.flock, []

    def flock(descriptor, how):
        if not seen:
            path.unlink()
        seen.append(descriptor)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock(path, path)
    lock.acquire()
    assert len(seen) == 2
    assert os.path.samestat(os.fstat(seen[1]), path.stat())
    lock.release()


def test_a_lock_that_another_thread_of_this_process_holds(path):
    first, second = FolderLock(path, path), FolderLock(path, path)
    first.acquire()
    with pytest.raises(OutputError, match=f"in use by process {os.getpid()}"):
        second.acquire()
    first.release()
