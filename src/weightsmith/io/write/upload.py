"""An output in an object store: shards go up one by one, as each is complete; the manifest goes last.

An object appears whole or not at all, cannot be written in parts at offsets, and cannot be renamed.  So each shard
is put together on this machine, sent when all its rows are there, and removed here.  While a run is going on:

    OUT/.weightsmith/run.json       who began: the run's identity, the layout of its files, a word of its own
    OUT/.weightsmith/<shard>.json   the shard is up: its size, and the records of the tasks that made it
    OUT/<shard>                     complete shards
    TMPDIR/weightsmith-out-<hash>/  shards under work, and a lock for other runs of this machine

OUT/weightsmith.json is written when all else is there, then OUT/.weightsmith goes.  Where the one is missing or the
other is there, the output is not finished; `open_source` refuses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith.core.errors import NotKept, OutputError
from weightsmith.core.keys import Key
from weightsmith.core.problem import Code, Problem, told
from weightsmith.io import system
from weightsmith.io.disk import files_in, gigabytes, remove, write_file, writing
from weightsmith.io.package.manifest import MANIFEST
from weightsmith.io.url import Url, stored_at, without_secrets
from weightsmith.io.write.aside import Aside
from weightsmith.io.write.journal import refuse_changed
from weightsmith.io.write.layout import Shard, Stores, indices, layout_digest, plan_shards
from weightsmith.io.write.lock import FolderLock, holder, in_use
from weightsmith.io.write.sink import Sink
from weightsmith.io.write.staging import Left, ShardUploads, stub
from weightsmith.io.write.store import delete, get_json, put

__all__ = ["RUNNING", "UrlSink", "check_url", "clear_marks"]

RUNNING = ".weightsmith"
_RUN = f"{RUNNING}/run.json"
_DEEPEST = 4  # levels of folders: parts of a model may lie in folders of their own


class UrlSink(Sink):
    """Writes a folder of safetensors shards to an object store; see the module's text.

    The arguments are those of `FolderSink`.  With `overwrite` the old output is removed before the first byte is
    written: a store has no place beside it that could become it in one step.
    """

    def __init__(
        self,
        out: Url,
        *,
        shard_size: int,
        identity: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        weight_name: str | Stores = "model",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.out = out
        self.home = _home(out)
        self.folder = self.home / "files"
        self._shard_size, self._weight_name, self._metadata = shard_size, weight_name, metadata or {"format": "pt"}
        self.identity = without_secrets(json.loads(json.dumps(identity)))
        self._resume, self._overwrite = resume, overwrite
        self._lock = FolderLock(self.home.with_suffix(".lock"), self.home)
        self._token = secrets.token_hex(8)
        self._shards: list[Shard] = []
        self._records: dict[str, Mapping[str, Any]] = {}
        self._completed: dict[str, Any] = {}
        self._guard = threading.Lock()
        self._uploads: ShardUploads | None = None
        self._elsewhere = False  # other processes write the shards

    def begin(self, keys: Sequence[Key]) -> None:
        """Take over what an interrupted run has sent, or clear the place.  Raises OutputError as `check_url` finds."""
        self._shards = plan_shards(keys, self._shard_size, self._weight_name, self._metadata)
        with writing(self.home.parent):
            system.call(self.home.parent.mkdir, parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            if problems := check_url(self.out, (), self._overwrite, self._resume, locked=True):
                raise OutputError("; ".join(map(str, problems)))
            names = stored_at(self.out, OutputError, _DEEPEST)
            with writing(self.home):
                remove(self.home)
                system.call(self.folder.mkdir, parents=True)
            sent = self._taken_over(names) if self._resume and _RUN in names else set()
            if not sent:
                delete(self.out, sorted(names, key=lambda name: name != MANIFEST))  # first what says it is complete
            head = {"identity": self.identity, "layout": layout_digest(self._shards), "token": self._token}
            put(self.out / _RUN, json.dumps(head).encode())
            left = [shard for shard in self._shards if shard.name not in sent]
            for shard in self._shards:
                if shard.name in sent:
                    stub(self.folder / shard.name, shard)
            self._uploads = ShardUploads(self.out, left, self.folder)
            self._left = Left(left)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        assert self._uploads is not None, "begin comes first"
        self._uploads.write(name, start, bits)

    def writer(self) -> Sink:
        self._elsewhere = True
        return ShardUploads(self.out, [shard for shard in self._shards if shard.name in self._left.rows])

    def aside(self) -> Aside:
        return Aside(self.home)

    def completed(self) -> Mapping[str, Any]:
        return self._completed

    def files_of(self, names: Iterable[str]) -> tuple[str, ...]:
        wanted = set(names)
        return tuple(shard.name for shard in self._shards if not wanted.isdisjoint(shard.keys))

    def done(self, task: str, record: Mapping[str, Any]) -> None:
        assert self._uploads is not None, "begin comes first"
        with self._guard:
            self._records[task] = record
            complete = self._left.less(record)
        for shard in complete:
            if self._elsewhere:
                stub(self.folder / shard.name, shard)
            else:
                self._uploads.send(shard)
            with self._guard:
                made = {name: found for name, found in self._records.items() if _touches(found, shard)}
            put(self.out / _mark(shard), json.dumps({"size": shard.size, "records": made}).encode())

    @contextlib.contextmanager
    def finishing(self) -> Iterator[Path]:
        """Give the folder for the files that go with the weights; then send them and the index, the manifest last."""
        try:
            for name, text in indices(self._shards).items():
                write_file(self.folder / name, text)
            yield self.folder
            sent = {self.folder / shard.name for shard in self._shards}
            paths = [path for path in files_in(self.folder) if path not in sent]
            for path in sorted(paths, key=lambda path: path.name == MANIFEST):
                name = path.relative_to(self.folder).as_posix()
                if name == MANIFEST:
                    self._refuse_incomplete()
                put(self.out / name, path)
            clear_marks(self.out)
        except NotKept:
            delete(self.out, sorted(stored_at(self.out, OutputError, _DEEPEST), key=lambda name: name != MANIFEST))
            raise
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove what is under work on this machine; what was sent stays, for --resume."""
        if self._uploads is not None:
            self._uploads.abort()
        if self._lock.held:
            system.call(shutil.rmtree, self.home, ignore_errors=True)
            self._lock.release()

    def _taken_over(self, names: Mapping[str, int | None]) -> set[str]:
        """The shards that are up, with all tasks that write to them; their records are then `_completed`."""
        head = get_json(self.out / _RUN)
        refuse_changed(self.out, head, self.identity, layout_digest(self._shards))
        records: dict[str, Any] = {}
        sent: dict[str, Shard] = {}
        for shard in self._shards:
            mark = _mark(shard)
            if mark in names and names.get(shard.name) == shard.size:
                sent[shard.name] = shard
                records |= get_json(self.out / mark)["records"]
        while True:  # a task that writes to two shards counts if both are up, and a shard if all of its tasks do
            there = {name for shard in sent.values() for name in shard.keys}
            kept = {task: record for task, record in records.items() if {part[0] for part in record["parts"]} <= there}
            lost = [s for s in sent.values() if any(_touches(records[t], s) for t in records.keys() - kept.keys())]
            if not lost:
                break
            for shard in lost:
                del sent[shard.name]
        self._completed, self._records = kept, dict(kept)
        return set(sent)

    def _refuse_incomplete(self) -> None:
        """Before the manifest says that all is there: it is, and no other run has taken the place over."""
        names = stored_at(self.out, OutputError, _DEEPEST)
        wrong = [shard.name for shard in self._shards if names.get(shard.name) != shard.size]
        if wrong:
            raise OutputError(f"{self.out}: {wrong[0]} is not there as it was sent; run again with --resume")
        if _RUN not in names or get_json(self.out / _RUN).get("token") != self._token:
            raise OutputError(f"{self.out}: another run has taken this place over; let it end, or choose another")


def _mark(shard: Shard) -> str:
    """What says that a shard is up; all marks lie side by side, whatever folder the shard is in."""
    return f"{RUNNING}/{shard.name.replace('/', '--')}.json"


def check_url(
    out: Url, inputs: Iterable[Path], overwrite: bool, resume: bool, need: int = 0, *, locked: bool = False
) -> list[Problem]:
    """What stands in the way of writing to a URL; `need`: bytes of this machine's disk.

    See `output.check_output`.  Raises OutputError where the store gives no answer.
    """
    problems = []
    for place in dict.fromkeys(inputs):
        if place == out.location:
            problems.append(f"{out} is also an input; choose another output folder")
        elif out.location in place.parents:
            problems.append(f"{out} holds an input, {place.name}; choose another output folder")
        elif place in out.location.parents:
            problems.append(f"{out} lies inside an input, {place.name}; choose another output folder")
    names = stored_at(out, OutputError, _DEEPEST)
    home = _home(out)
    user = None if locked else holder(home.with_suffix(".lock"))
    if user is not None:
        problems.append(in_use(home, user).replace(str(home), str(out)))
    elif _RUN in names and MANIFEST not in names:
        if not (resume or overwrite):
            problems.append(
                f"{out}: a previous run was interrupted; pass --resume to continue it or --overwrite to start anew"
            )
    elif names and not overwrite:
        problems.append(f"{out} exists and is not empty; choose another folder or pass --overwrite")
    found = list(told(Code.OUTPUT, problems, str(out)))
    free = system.call(shutil.disk_usage, home.parent).free
    if need > free:
        text = f"{out} needs {gigabytes(need)} here to put its files together, but {gigabytes(free)} are free in "
        more = f"{home.parent}; choose a smaller output.shard_size, or set TMPDIR"
        found.append(Problem(Code.DISK, str(home.parent), text + more))
    return found


def clear_marks(out: Url) -> None:
    """Remove what says that a run is going on."""
    names = stored_at(out, OutputError, _DEEPEST)
    delete(out, [name for name in names if name.startswith(f"{RUNNING}/") and name != _RUN] + [_RUN] * (_RUN in names))


def _touches(record: Mapping[str, Any], shard: Shard) -> bool:
    return any(part[0] in shard.keys for part in record["parts"])


def _home(out: Url) -> Path:
    """Where shards for a URL are put together: one place of this machine, so that two runs meet there."""
    name = hashlib.sha256(f"{out.scheme}://{out.rest}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"weightsmith-out-{name}"
