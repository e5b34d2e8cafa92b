"""What can go wrong at a call to the file system, put in place of `weightsmith.io.system.call`."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

READERS = {os.preadv}
WRITERS = {os.pwrite, os.write}
FILLERS = {"pwrite", "write", "posix_fallocate", "mkdir", "open", "fsync", "fdatasync", "ftruncate"}
SYNCS = {os.fsync, os.fdatasync}


class Calls:
    """Counts calls, and lets the fault happen at the chosen one.

    fault: {"kind": K, "at": n, "lasting": bool, "seed": s, "only": name of the calls that count}.  Kinds:
        ENOSPC, EIO, ...  the call fails; if lasting, so does every later one that could (for ENOSPC: those that
                          take space)
        short             a read or write transfers half of what it was asked for; if lasting, so do all later ones
        kill              SIGKILL instead of the call
        torn              SIGKILL in the middle of a write: half of the data is there
        power             the machine stops: SIGKILL, and what was not flushed is lost, in part or as a whole
    """

    def __init__(self, fault: dict[str, Any] | None) -> None:
        self.fault = fault or {}
        self.count = 0
        self.lock = threading.Lock()
        self.disk = Unsafe(self.fault.get("seed", 0)) if self.fault.get("kind") == "power" else None

    def __call__(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        only = self.fault.get("only")
        if only is not None and function.__name__ != only:
            return function(*args, **kwargs)
        with self.lock:
            self.count += 1
            number = self.count
        kind, at = self.fault.get("kind"), self.fault.get("at", 0)
        if number == at or (number > at and self.fault.get("lasting")):
            if kind == "kill" or (kind == "torn" and function not in WRITERS):
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "power":
                assert self.disk is not None
                self.disk.lose()
            elif kind in ("short", "torn"):
                done = _half(function, args, kwargs)
                if kind == "torn":
                    os.kill(os.getpid(), signal.SIGKILL)
                return done
            elif kind in errno.errorcode.values() and (kind != "ENOSPC" or function.__name__ in FILLERS):
                raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))
        if self.disk is not None:
            return self.disk.call(function, args, kwargs)
        return function(*args, **kwargs)


def _half(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if function in WRITERS and len(args[1]) > 1:
        return function(args[0], args[1][: len(args[1]) // 2], *args[2:])
    if function in READERS and args[1][0].nbytes > 1:
        return function(args[0], [args[1][0][: args[1][0].nbytes // 2]], *args[2:])
    return function(*args, **kwargs)


class Unsafe:
    """A disk that keeps for certain only what was flushed.

    At the end every write that no fsync has covered is there, or gone (zeros where nothing was before); of an
    appended file some bytes are, cut off or followed by zeros; a file never flushed may be empty; the last
    renames may not have happened.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.writes: dict[int, list[tuple[int, int, bytes]]] = {}  # inode -> (own descriptor, offset, what was there)
        self.sizes: dict[int, tuple[int, int]] = {}  # inode -> (own descriptor, flushed size) of appended files
        self.fresh: dict[int, int] = {}  # inode -> own descriptor of files made and never flushed
        self.renames: list[tuple[Path, Path, bytes | None]] = []  # from, to, the file that was there

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.lock:
            if function in WRITERS | SYNCS:
                inode = os.fstat(args[0]).st_ino
                path = f"/proc/self/fd/{args[0]}"
            if function is os.pwrite:
                descriptor = os.open(path, os.O_RDWR)
                before = os.pread(descriptor, len(args[1]), args[2])
                self.writes.setdefault(inode, []).append((descriptor, args[2], before.ljust(len(args[1]), b"\0")))
            elif function is os.write and inode not in self.sizes:
                self.sizes[inode] = (os.open(path, os.O_RDWR), os.fstat(args[0]).st_size)
            elif function in SYNCS:
                for log in (self.writes, self.sizes, self.fresh):
                    log.pop(inode, None)
                here = Path(path).readlink()
                self.renames = [each for each in self.renames if each[1].parent != here]
            renames = function.__name__ in ("rename", "replace")
            replaced = args[0].read_bytes() if renames and args[0].is_file() else None
            done = function(*args, **kwargs)
            if function is os.open and args[1] & os.O_CREAT:
                inode = os.fstat(done).st_ino
                self.fresh[inode] = os.open(f"/proc/self/fd/{done}", os.O_RDWR)
            elif renames:
                self.renames.append((function.__self__, args[0], replaced))  # a Path's method
            return done

    def lose(self) -> None:
        chance = self.random
        for records in self.writes.values():
            for descriptor, offset, before in reversed(records):
                if chance.random() < 0.5:
                    os.pwrite(descriptor, before, offset)
        for descriptor, flushed in self.sizes.values():
            kept = chance.randint(flushed, os.fstat(descriptor).st_size)
            end = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, kept)
            if chance.random() < 0.5:
                os.ftruncate(descriptor, max(end, -(-kept // 4096) * 4096))
        for descriptor in self.fresh.values():
            if chance.random() < 0.5:
                os.ftruncate(descriptor, 0)
        for source, target, replaced in reversed(self.renames):
            if chance.random() < 0.5:
                break
            if not source.exists():
                target.rename(source)
                if replaced is not None:
                    target.write_bytes(replaced)
        os.kill(os.getpid(), signal.SIGKILL)


def install(fault: dict[str, Any] | None) -> Calls:
    from weightsmith.io import system

    calls = Calls(fault)
    system.call = calls  # type: ignore[assignment]
    return calls


def patch(changes: dict[str, Any]) -> None:
    """boot: the machine's boot id; interval: seconds between flushes; clock: 'backwards'; limit: largest file in
    bytes; version: of weightsmith."""
    from weightsmith.io.write import journal, output
    from weightsmith.jobs import job

    if "version" in changes:
        job.__version__ = changes["version"]

    if "boot" in changes:
        journal.boot_id = output.boot_id = lambda: changes["boot"]  # type: ignore[assignment]
    if "interval" in changes:
        journal.Journal.__init__.__defaults__ = (changes["interval"],)
    if changes.get("clock") == "backwards":
        start = time.time()
        ticks = iter(range(10**9))
        time.time = lambda: start - 3600 * next(ticks)
        time.time_ns = lambda: int(time.time() * 1e9)
    if "limit" in changes:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (changes["limit"],) * 2)
