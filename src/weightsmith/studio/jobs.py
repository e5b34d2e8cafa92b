"""The queue: one command of weightsmith at a time, each a process of its own, its state in the folder.

Nothing is remembered here: what a job is doing is read from its files and from a lock, so that a server started
later, a second tab and a reloaded page all tell the same.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError, RecipeError, SourceError
from weightsmith.io import system
from weightsmith.io.disk import replace_file, writing
from weightsmith.io.read.small import read_json
from weightsmith.studio.seal import sealed, unbroken

__all__ = ["Job", "Jobs", "Progress"]

RESUMED = ("merge", "compress", "restore")
"""Verbs that go on with --resume; others begin again, or go on by themselves."""
_LIMIT = 200_000_000  # bytes of a job's answer
_LOG = 64_000
_ENDS = {130: "stopped", 143: "stopped", 137: "interrupted"}
"""Exit codes: of Ctrl-C or SIGTERM, of SIGKILL."""


@dataclass(frozen=True)
class Progress:
    """How far a job is: `unit` 'bytes' or ''; `rate` per second since it began, `left` seconds, None if unknown."""

    done: int
    total: int
    unit: str
    rate: float | None
    left: float | None

    @property
    def share(self) -> float:
        return min(self.done / self.total, 1.0) if self.total else 0.0


@dataclass(frozen=True)
class Job:
    """One command.  state: queued, running, finished, failed, stopped (by a person) or interrupted (nobody knows)."""

    id: str
    words: tuple[str, ...]
    title: str
    state: str
    created: float
    folder: Path
    more: tuple[str, ...] = ()
    code: int | None = None
    ended: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verb(self) -> str:
        return self.words[0]

    @property
    def command(self) -> str:
        return shlex.join(["weightsmith", *self.words, *self.more])

    @property
    def over(self) -> bool:
        return self.state not in ("queued", "running")

    @property
    def out(self) -> str:
        """The folder that the command writes; '' if it writes none."""
        return _out(self.words)

    @property
    def begun(self) -> bool:
        return (self.folder / "started").exists()

    @property
    def resumable(self) -> bool:
        return self.state in ("stopped", "interrupted", "failed")

    def log(self) -> str:
        """The last of what the command has said."""
        try:
            size = system.call((self.folder / "log").stat).st_size
            with system.call((self.folder / "log").open, "rb") as file:
                system.call(file.seek, max(0, size - _LOG))
                return bytes(system.call(file.read, _LOG)).decode(errors="replace")
        except OSError:
            return ""

    def output(self) -> str:
        """The first of what the command has printed."""
        with suppress(OSError):
            return system.read_file(self.folder / "out", _LOG).decode(errors="replace")
        return ""

    def answer(self) -> Any:
        """The JSON that the command has printed; SourceError where it is none."""
        return read_json(self.folder / "out", _LIMIT)

    def progress(self) -> Progress | None:
        try:
            noted = json.loads(system.read_file(self.folder / "progress", 1000))
            done, total, first, seconds = (noted[name] for name in ("done", "total", "first", "seconds"))
            rate = (done - first) / seconds if seconds > 0 and done > first else None
            left = (total - done) / rate if rate else None
            return Progress(int(done), int(total), str(noted["unit"]), rate, left)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _out(words: Sequence[str]) -> str:
    return words[2] if words[0] in RESUMED and len(words) > 2 else ""


class Jobs:
    """The jobs in a folder.  Commands run in `cwd`."""

    def __init__(self, folder: Path, cwd: Path) -> None:
        self.folder, self.cwd = folder / "jobs", cwd
        self._lock = folder / "running"
        self._guard = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._environment = dict(os.environ)
        self._thread: threading.Thread | None = None
        for path in (folder, self.folder, self._lock, folder / "drafts", folder / ".gitignore"):
            if path.is_symlink():
                raise OutputError(f"{path}: a link, where the studio keeps its own files; remove it")
        with writing(folder):
            system.call(self.folder.mkdir, parents=True, exist_ok=True)
            if not (folder / ".gitignore").exists():
                replace_file(folder / ".gitignore", b"*\n")

    # --- looking -------------------------------------------------------------------------------

    def all(self) -> list[Job]:
        """Every job, the newest first."""
        with writing(self.folder):
            names = sorted(path.name for path in system.call(list, self.folder.iterdir()))
        running = self._running()
        found = (self._read(name, running) for name in reversed(names) if name.isdecimal())
        return [job for job in found if job is not None]

    def get(self, number: str) -> Job:
        """Raises SourceError if there is no such job."""
        found = self._read(number, self._running()) if number.isdecimal() and len(number) <= 9 else None
        if found is None:
            raise SourceError(f"there is no job {number!r}; it may have been removed in another tab")
        return found

    def _read(self, name: str, running: str) -> Job | None:
        place = self.folder / name
        try:
            noted = read_json(place / "job.json", 1_000_000)
            if not unbroken(name, noted):
                return None
            words, created = tuple(map(str, noted["words"])), float(noted["created"])
            more, title, about = tuple(noted.get("more", ())), str(noted["title"]), dict(noted.get("about", {}))
        except (SourceError, OSError, KeyError, TypeError, ValueError, AttributeError):
            return None  # just being written, or not ours
        code = ended = None
        state = "interrupted" if (place / "started").exists() else "queued"
        if running == name:
            state = "running"
        elif (place / "done").exists():
            try:
                done = read_json(place / "done", 1000)
                code, ended = int(done["code"]), float(done["ended"])
                fine = code == 0 or (words[0] == "diff" and code == 1)
                state = "finished" if fine else _ENDS.get(code, "failed")
            except (SourceError, KeyError, TypeError, ValueError):
                state = "interrupted"
        return Job(name, words, title, state, created, place, more, code, ended, about)

    def _running(self) -> str:
        """Id of the job that holds the lock; '' if none does."""
        try:
            descriptor = system.call(os.open, self._lock, os.O_RDONLY)
        except FileNotFoundError:
            return ""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return system.call(os.read, descriptor, 20).decode(errors="replace").strip()
        finally:
            os.close(descriptor)
        return ""

    # --- doing ---------------------------------------------------------------------------------

    def add(self, words: Sequence[str], title: str, about: Mapping[str, Any] | None = None) -> Job:
        """Queue a command (its words without the program's name); the same one that waits or runs is not queued again.

        Raises OutputError where another job is about to write the same output.
        """
        if any("\0" in word for word in words):
            raise RecipeError("a command's words hold no zero character")
        with self._guard, writing(self.folder):
            for job in self.all():
                if not job.over and job.words == tuple(words) and job.about == (about or {}):
                    return job
                if not job.over and job.out and job.out == _out(words) and "--overwrite" not in words:
                    raise OutputError(
                        f"job {job.id} is about to write {job.out}; wait for it, stop it, or name another folder"
                    )
            taken = [int(path.name) for path in system.call(list, self.folder.iterdir()) if path.name.isdecimal()]
            place = self.folder / f"{max(taken, default=0) + 1:04d}"
            system.call(place.mkdir)
            noted = {"words": list(words), "title": title, "created": time.time(), "about": dict(about or {})}
            replace_file(place / "job.json", sealed(place.name, noted))
        self._wake.set()
        return self.get(place.name)

    def resume(self, number: str) -> Job:
        """Queue a job again that ended too early."""
        job = self.get(number)
        if not job.resumable:
            raise OutputError(f"job {number} is {job.state}; only one that was stopped or has failed can go on")
        noted = read_json(job.folder / "job.json", 1_000_000)
        # A run that wrote nothing yet has nothing to go on from; --resume then begins at the beginning.
        noted["more"] = ["--resume"] if job.verb in RESUMED and "--overwrite" not in job.words else []
        with writing(job.folder):
            replace_file(job.folder / "job.json", sealed(job.id, noted))
            for name in ("done", "pid", "progress", "runner", "started"):
                with suppress(FileNotFoundError):
                    system.call((job.folder / name).unlink)
        self._wake.set()
        return self.get(number)

    def stop(self, number: str) -> Job:
        """End a job as Ctrl-C would, so that it can go on later; take a queued one out of the queue."""
        job = self.get(number)
        if job.state == "queued":
            replace_file(job.folder / "done", json.dumps({"code": 130, "ended": time.time()}).encode())
        elif job.state == "running":
            for _ in range(50):  # it may have been started this moment
                with suppress(OSError, ValueError):
                    os.kill(int(system.read_file(job.folder / "pid", 20)), signal.SIGTERM)
                    break
                time.sleep(0.05)
        return self.get(number)

    def remove(self, number: str) -> None:
        """Forget a job that is over; what it has written stays."""
        if self.get(number).over:
            with writing(self.folder):
                system.call(shutil.rmtree, self.folder / number)

    # --- the queue -----------------------------------------------------------------------------

    def open(self) -> None:
        """Begin to work through the queue."""
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop, and the running job with it; it can go on later."""
        self._closed = True
        self._wake.set()
        if running := self._running():
            self.stop(running)
        if self._thread is not None:
            self._thread.join(5)

    def _work(self) -> None:
        while not self._closed:
            self._wake.wait(0.5)
            self._wake.clear()
            with suppress(OutputError, SourceError):  # a full disk, say: looked at again in a moment
                self._left_alone()
                self._next()

    def _left_alone(self) -> None:
        """Stop a command whose runner was killed: nobody would note how it ended.  It can go on later."""
        place = self.folder / (self._running() or "none")
        try:
            with system.call((place / "runner").open, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return  # it lives, or has not begun
        if not (place / "done").exists():
            self.stop(place.name)

    def _next(self) -> None:
        waiting = [job for job in self.all() if job.state == "queued"]
        if not waiting or self._closed:
            return
        job = waiting[-1]
        with writing(self._lock):
            descriptor = system.call(os.open, self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return  # another one runs, maybe of another server
        try:
            with writing(self._lock):
                system.call(os.ftruncate, descriptor, 0)
                system.call(os.pwrite, descriptor, job.id.encode(), 0)
                replace_file(job.folder / "started", b"")
            child = subprocess.Popen(
                [sys.executable, "-m", "weightsmith.studio.runner", str(job.folder), str(descriptor)],
                cwd=self.cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(descriptor,), start_new_session=True, env=self._environment,
            )  # fmt: skip
        finally:
            os.close(descriptor)  # the child's copies hold the lock
        child.wait()
