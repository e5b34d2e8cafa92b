"""What a run has finished so far, on disk, so that the next one can go on from there.

A text file of JSON lines.  Each line holds the xxh3 checksum of its own content and is written by one
`write`; reading stops at the first line that does not check, so a torn or zeroed tail is cut off.

    head     who began: the run's identity, the layout of its files, the machine's boot id
    task     a finished task and its record
    synced   n: the data of the first n task lines has been flushed to the disk
    replaces name of the folder that holds the old output while the new one takes its place

When a task line counts.  A task's data is handed to the kernel before its line is, so after a crash of
the *process* (kill -9, out of memory) every line holds: the kernel still has both.  After a crash of the
*machine* it may have kept the line and lost the data; so every `interval` seconds one of the workers
flushes the shards and then writes a `synced` line, and a reader on another boot of the machine (or on
another machine) believes only the tasks that such a line covers.  A run that takes less than the interval
flushes once, at its end.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from weightsmith.core.errors import OutputError
from weightsmith.io import system
from weightsmith.io.disk import sync_folder, write_all, writing

__all__ = ["Journal", "State", "boot_id", "differences", "read_journal", "refuse_changed"]

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PREFIX = b'{"xxh3":"'
_MIDDLE = b'","entry":'
_PAYLOAD = len(_PREFIX) + 16 + len(_MIDDLE)


@dataclass
class State:
    """What a journal says."""

    head: Mapping[str, Any]
    tasks: list[tuple[str, Any]] = field(default_factory=list)
    synced: int = 0
    replaces: str | None = None

    def finished(self, boot: str) -> dict[str, Any]:
        """Task -> record of the tasks whose data is certainly there, for a machine that runs under boot id `boot`."""
        same_boot = self.head.get("boot") == boot != ""
        return dict(self.tasks if same_boot else self.tasks[: self.synced])


def boot_id() -> str:
    """A name for the time since the kernel started; empty where the system has none (then nothing matches it).

    Raises OutputError where it has one that cannot be read now: finished work must not be taken for lost by mistake.
    """
    try:
        return system.read_file(_BOOT).decode().strip()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
    except OSError as error:
        raise OutputError(f"cannot read {_BOOT}: {error.strerror}; run again with --resume") from error


def read_journal(path: Path) -> State | None:
    """The state up to the first damaged line, or None if there is no file or its first line is damaged."""
    try:
        lines = system.read_file(path).split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(
            f"cannot resume: reading {path} failed ({error.strerror or error}); check the disk, then try again"
        ) from error
    head = _entry(lines[0])
    if head is None or "head" not in head:
        return None
    state = State(head["head"])
    for line in lines[1:]:
        entry = _entry(line)
        if entry is None:
            break
        if "task" in entry:
            state.tasks.append((entry["task"], entry["record"]))
        elif "synced" in entry:
            state.synced = entry["synced"]
        elif "replaces" in entry:
            state.replaces = entry["replaces"]
    return state


class Journal:
    """The journal of a running merge; `add` may be called from several threads.

    `flush` makes the data of all finished tasks durable.  Opening writes the file anew, in one step, with
    the tasks taken over from an earlier run, whose data the caller has flushed.
    """

    def __init__(
        self,
        path: Path,
        head: Mapping[str, Any],
        tasks: Mapping[str, Any],
        flush: Callable[[], None],
        interval: float = 5.0,
    ) -> None:
        self.path = path
        self.count = len(tasks)
        self._flush, self._interval = flush, interval
        self._guard = threading.Lock()
        self._flushing = False
        self._flushed_at = time.monotonic()
        lines: list[dict[str, Any]] = [{"head": {**head, "boot": boot_id()}}]
        lines += [{"task": task, "record": record} for task, record in tasks.items()]
        lines += [{"synced": self.count}]
        fresh = path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        with writing(path):
            self._descriptor = system.call(os.open, fresh, flags, 0o666)
            try:
                self._append(*lines)
                system.call(os.fsync, self._descriptor)
                system.call(fresh.replace, path)
                sync_folder(path.parent)
            except BaseException:
                self.close()
                raise

    def add(self, task: str, record: Mapping[str, Any]) -> None:
        """A task is finished, and its data has been handed to the kernel."""
        with self._guard:
            self._append({"task": task, "record": record})
            self.count += 1
            count = self.count
            due = not self._flushing and time.monotonic() - self._flushed_at >= self._interval
            self._flushing = self._flushing or due
        if due:  # this worker flushes; the others go on, and the tasks they add meanwhile are not covered
            self._flush()
            with self._guard:
                self._append({"synced": count})
                self._flushing, self._flushed_at = False, time.monotonic()

    def replaces(self, name: str) -> None:
        """The old output is about to be moved to this name beside the new one; durable on return."""
        with self._guard, writing(self.path):
            self._append({"replaces": name})
            system.call(os.fsync, self._descriptor)

    def close(self) -> None:
        with self._guard:
            # Forgotten before it is closed: an interrupt in between must not let it be closed twice, when the number
            # may be another file's.
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)

    def _append(self, *entries: Mapping[str, Any]) -> None:
        data = b"".join(map(_line, entries))
        with writing(self.path):
            write_all(self._descriptor, data)  # of a line that a full disk cuts short, the next reader sees the end


def refuse_changed(what: object, head: Mapping[str, Any], identity: Mapping[str, Any], layout: str) -> None:
    """Raise OutputError if a run that began with this head (see `Journal`) was another one than is to go on."""
    changed = differences(head.get("identity", {}), identity)
    if not changed and head.get("layout") != layout:
        changed = ["the layout of the output (tensors, dtypes or shard_size)"]
    if changed:
        raise OutputError(
            f"cannot resume {what}: since it was begun, {', '.join(changed)} changed; pass --overwrite to start anew"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed, in words: 'recipe (method)', "input 'math'", 'version'."""
    changed = []
    for part in _unlike(old, new):
        before, after = old.get(part), new.get(part)
        if not isinstance(before, dict) or not isinstance(after, dict):
            changed.append(f"{part} ({before} -> {after})" if isinstance(before, str) else part)
            continue
        inner = _unlike(before, after)
        if part == "inputs" and inner:
            changed += [f"input {name!r}" for name in inner]
        else:
            changed.append(f"{part} ({', '.join(inner) or 'order'})")
    return changed


def _unlike(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names under which two JSON objects differ; the order of names counts, as the order of models does."""
    return [name for name in dict.fromkeys([*old, *new]) if json.dumps(old.get(name)) != json.dumps(new.get(name))]


def _line(entry: Mapping[str, Any]) -> bytes:
    return _seal(json.dumps(entry, separators=(",", ":")).encode()) + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    """The content of a line, or None if it is not whole."""
    payload = line[_PAYLOAD:-1]
    if line != _seal(payload):
        return None
    entry: dict[str, Any] = json.loads(payload)
    return entry


def _seal(payload: bytes) -> bytes:
    return _PREFIX + xxhash.xxh3_64_hexdigest(payload).encode() + _MIDDLE + payload + b"}"


# --- what a run depends on ---------------------------------------------------------------------------
