"""One run per output folder: an advisory lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

from weightsmith.core.errors import OutputError
from weightsmith.io import system
from weightsmith.io.disk import pwrite_all, writing

__all__ = ["FolderLock", "holder", "in_use"]

_ATTEMPTS = 5
_PAUSE = 0.02  # seconds; covers another process's moment of looking (`holder`) or of releasing


class FolderLock:
    """`flock` on the file `path`, beside the output `folder`.

    The kernel drops the lock when the process ends, however it ends; the file that kill -9 leaves behind
    is taken over by the next run.  The file says who holds it: process id, host, start time.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> None:
        """Take the lock, or raise OutputError naming the holder."""
        for _ in range(_ATTEMPTS):
            with writing(self.path):
                descriptor = system.call(os.open, self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                system.call(fcntl.flock, descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = _who(descriptor)
                os.close(descriptor)
                time.sleep(_PAUSE)
                continue
            except OSError as error:
                os.close(descriptor)
                raise OutputError(
                    f"cannot lock {self.path}: {error.strerror}; choose a folder on a file system with file locks"
                ) from error
            with writing(self.path):
                ours = _is_file_at(self.path, descriptor)
            if not ours:  # its last holder removed it between our open and our lock
                os.close(descriptor)
                who = "a run that is just ending"
                continue
            started = time.strftime("%Y-%m-%d %H:%M:%S %z")
            text = json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "started": started})
            self._descriptor = descriptor
            try:
                with writing(self.path):
                    system.call(os.ftruncate, descriptor, 0)
                    pwrite_all(descriptor, text.encode(), 0)
            except BaseException:
                self.release()
                raise
            return
        raise OutputError(in_use(self.folder, who))

    def release(self) -> None:
        """Remove the file and drop the lock; a second call does nothing."""
        # Forgotten first: an interrupt must not let a second call remove or close what is another's by then.
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                with contextlib.suppress(OSError):  # a file that stays is no lock
                    # While still held: nobody can have locked this file in between.
                    system.call(self.path.unlink, missing_ok=True)
            finally:
                os.close(descriptor)


def holder(path: Path) -> str | None:
    """Who holds the lock at a path ('process 12 on host a since ...'), or None.  Creates nothing."""
    try:
        descriptor = system.call(os.open, path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _who(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def in_use(folder: Path, who: str) -> str:
    """The text for a folder that another run holds."""
    return f"{folder} is in use by {who}; wait for it to end, or stop it"


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _who(descriptor: int) -> str:
    try:
        note = json.loads(system.call(os.pread, descriptor, 4096, 0))
        return f"process {note['pid']} on host {note['host']} since {note['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"  # it has the lock but has not written its note yet
