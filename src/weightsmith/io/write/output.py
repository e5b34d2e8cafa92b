"""The output folder: safetensors shards written in place, visible under their name only when complete.

While a run is going on, beside OUT (so that a rename is enough to move things):

    OUT.partial/files/       what OUT will be
    OUT.partial/journal.jsonl
    OUT.partial.lock         held by the running process

At the end everything is flushed to the disk, `files` is renamed to OUT in one step, and OUT.partial goes.
With `overwrite`, the old OUT is first renamed to OUT.replaced-XXXX, a name noted in the journal, and deleted
after the new one has taken its place.  So at every moment OUT is the old output, or the new one, or (between
two renames) absent, with the old one at OUT.replaced-XXXX and the new one complete in OUT.partial/files; the
next run on OUT puts the old one back before it does anything else.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from weightsmith.core.errors import NotKept, OutputError
from weightsmith.core.keys import Key
from weightsmith.core.problem import Code, Problem, told
from weightsmith.io import system
from weightsmith.io.disk import (
    WriteOut,
    allocated,
    gigabytes,
    remove,
    sync_folder,
    sync_tree,
    write_file,
    writing,
)
from weightsmith.io.url import Url, absolute, output_of, parse_url
from weightsmith.io.write.aside import Aside
from weightsmith.io.write.journal import Journal, State, boot_id, read_journal, refuse_changed
from weightsmith.io.write.layout import Shard, Stores, indices, layout_digest, plan_shards
from weightsmith.io.write.lock import FolderLock, holder, in_use
from weightsmith.io.write.sink import Sink
from weightsmith.io.write.upload import check_url
from weightsmith.io.write.writer import ShardWriter, lay_out

__all__ = ["FolderSink", "check_output", "tidy"]

_METADATA: Mapping[str, str] = {"format": "pt"}


class FolderSink(Sink):
    """Writes a folder of safetensors shards; see the module's text for what is where, and when.

    out        the folder to make; missing parents are made too
    shard_size largest number of data bytes in one file
    identity   what the output depends on: {"recipe": {...}, "inputs": {name: fingerprint}, "version": "..."};
               plain JSON values.  A run is resumed only under the same identity.
    resume     go on with what an interrupted run has left in OUT.partial, if anything
    overwrite  replace a non-empty OUT as a whole; without `resume`, also drop what an interrupted run has left
    """

    def __init__(
        self,
        out: Path,
        *,
        shard_size: int,
        identity: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        weight_name: str | Stores = "model",
        metadata: Mapping[str, str] = _METADATA,
    ) -> None:
        self.out = absolute(out)
        self.partial = _partial(self.out)
        self.folder = self.partial / "files"
        self._shard_size, self._weight_name, self._metadata = shard_size, weight_name, metadata
        self.identity = json.loads(json.dumps(identity))  # as it will be read back: tuples become lists
        self._resume, self._overwrite = resume, overwrite
        self._lock = FolderLock(_lock_path(self.out), self.out)
        self._shards: list[Shard] = []
        self._descriptors: dict[str, int] = {}
        self._writer = ShardWriter(self.folder, ())
        self._completed: dict[str, Any] = {}
        self._journal: Journal | None = None
        self._write_out = WriteOut()
        self._working = False  # the work folder is this run's: laid out by it, or taken over without a complaint

    def begin(self, keys: Sequence[Key]) -> None:
        """Lay out the files, or take over those of an interrupted run.

        Raises OutputError, with nothing changed on disk, where `check_output` finds a problem or another
        run holds the folder; and where what is to be resumed belongs to another recipe or is damaged.
        """
        self._shards = plan_shards(keys, self._shard_size, self._weight_name, self._metadata)
        names = {name for shard in self._shards for name in shard.keys}
        if len(names) != len(keys):
            raise OutputError(f"{self.out}: {len(keys) - len(names)} tensor names are used twice")
        if not self.partial.exists():  # else first see what was left there; a refusal now leaves not even a lock file
            self._check(need=0)
        with writing(self.out.parent):
            system.call(self.out.parent.mkdir, parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            state = _recover(self.out)
            self._check(need=sum(shard.size for shard in self._shards))
            if state is None or not self._resume or not self._take_over(state):
                self._create()
            head = {"identity": self.identity, "layout": layout_digest(self._shards)}
            self._journal = Journal(self.partial / "journal.jsonl", head, self._completed, self._flush)
            self._writer = ShardWriter(self.folder, self._shards, self._descriptors)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, start: int, bits: np.ndarray) -> None:
        """Store rows `start`, `start + 1`, ... of a tensor: bits [rows, *rest], or [] for a 0-dim tensor."""
        self._write_out.add(*self._writer.put(name, start, bits))

    def writer(self) -> Sink:
        return ShardWriter(self.folder, self._shards)

    def aside(self) -> Aside:
        return Aside(self.partial)

    def completed(self) -> Mapping[str, Any]:
        return self._completed

    def done(self, task: str, record: Mapping[str, Any]) -> None:
        assert self._journal is not None, "begin comes first"
        self._journal.add(task, record)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[Path]:
        """Write the index, give the folder for the files that go with the weights, then make OUT visible with all."""
        assert self._journal is not None, "begin comes first"
        try:
            with writing(self.partial):
                for name, text in indices(self._shards).items():
                    write_file(self.folder / name, text)
                yield self.folder
                self._complete(self._journal)
        except BaseException as error:
            self.abort(keep=not isinstance(error, NotKept))
            raise
        self._working = False
        self.abort()  # nothing is left to keep: closes what is open, and drops the lock

    def _complete(self, journal: Journal) -> None:
        with writing(self.partial):
            sync_tree(self.folder)
        with writing(self.out):
            old = self._publish(journal)
        try:
            if old is not None:
                remove(old)
            _discard(self.partial)
        except OSError as error:
            left = self.partial if old is None or not old.exists() else old
            raise OutputError(
                f"{self.out} is complete, but {left} could not be removed ({error.strerror}); remove it yourself"
            ) from error

    def abort(self, keep: bool = True) -> None:
        """Close everything.  What can be resumed stays (if `keep`); a work folder with no finished task in it goes."""
        while self._descriptors:  # forgotten one by one, see `Journal.close`
            _, descriptor = self._descriptors.popitem()
            with contextlib.suppress(OSError):  # what had to be on the disk was flushed before
                os.close(descriptor)
        if self._journal is not None:
            self._journal.close()
        finished = self._journal.count if self._journal is not None else len(self._completed)
        if self._working and not (finished and keep):
            with contextlib.suppress(OSError):  # the next run can live with it, and there is an error to report already
                _discard(self.partial)
        self._working, self._journal = False, None
        self._lock.release()

    # --- steps of begin and finish ---------------------------------------------------------------

    def _check(self, need: int) -> None:
        problems = check_output(self.out, (), self._overwrite, self._resume, need, locked=self._lock.held)
        if problems:
            raise OutputError("; ".join(map(str, problems)))

    def _create(self) -> None:
        self._working = True
        with writing(self.folder):
            _discard(self.partial)
            system.call(self.partial.mkdir)
            system.call(self.folder.mkdir)
        for shard in self._shards:
            lay_out(self.folder, shard, self._descriptors)
        with writing(self.folder):  # the journal's own folder is made durable together with the journal
            sync_folder(self.folder)
            sync_folder(self.out.parent)

    def _take_over(self, state: State) -> bool:
        """Open what an interrupted run has made; False if it had finished nothing that is certainly on the disk."""
        refuse_changed(self.partial, state.head, self.identity, layout_digest(self._shards))
        finished = state.finished(boot_id())
        if not finished:
            return False
        for shard in self._shards:
            path = self.folder / shard.name
            damage = f"cannot resume: {path} is missing or was changed; pass --overwrite to start anew"
            with writing(path):
                try:
                    descriptor = system.call(os.open, path, os.O_RDWR)
                except FileNotFoundError as error:
                    raise OutputError(damage) from error
                self._descriptors[shard.name] = descriptor
                found = system.call(os.pread, descriptor, len(shard.header), 0)
                if os.fstat(descriptor).st_size != shard.size or found != shard.header:
                    raise OutputError(damage)
        planned = {shard.name for shard in self._shards}
        with writing(self.folder):
            within = {parent.as_posix() for name in planned for parent in PurePosixPath(name).parents}
            for place in sorted(within):
                for entry in sorted(system.call(os.listdir, self.folder / place)):
                    name = (PurePosixPath(place) / entry).as_posix()
                    if name not in planned and name not in within:  # a `finish` that was cut short may have left it
                        remove(self.folder / name)
        self._flush()
        self._completed, self._working = finished, True
        return True

    def _flush(self) -> None:
        for name, descriptor in self._descriptors.items():
            with writing(self.folder / name):
                system.call(os.fdatasync, descriptor)

    def _publish(self, journal: Journal) -> Path | None:
        """Put the new folder in its place, durably; returns where the old one is now, if there was one."""
        old = None
        if self._overwrite and self.out.exists():
            old = self.out.with_name(f"{self.out.name}.replaced-{secrets.token_hex(4)}")
            journal.replaces(old.name)
            system.call(self.out.rename, old)
        try:
            # Over an empty folder too; the kernel refuses if it is not empty.
            system.call(self.folder.rename, self.out)
        except OSError as error:
            if old is not None:
                system.call(old.rename, self.out)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                text = f"{self.out} was filled by somebody else during the run; move it away, then pass --resume"
                raise OutputError(text) from error
            raise
        self._working = False  # from here on there is nothing to resume
        sync_folder(self.out.parent)
        return old


def check_output(
    out: Path,
    inputs: Iterable[Path],
    overwrite: bool,
    resume: bool,
    needed_bytes: int,
    *,
    locked: bool = False,
    local_bytes: int | None = None,
) -> list[Problem]:
    """Return everything that stands in the way of writing `needed_bytes` to the folder `out`.

    inputs are the folders and files that are read.  `locked`: the caller holds the folder's lock.  Creates nothing.
    `local_bytes`: how many of them are on this machine's disk at once where `out` is a URL (default: all).
    Raises OutputError where the disk does not even let itself be looked at.
    """
    if (url := output_of(out)) is not None:
        return check_url(url, inputs, overwrite, resume, needed_bytes if local_bytes is None else local_bytes)
    out = absolute(out)
    given = dict.fromkeys(absolute(path) for path in inputs if not isinstance(parse_url(path), Url))
    roots = [path for path in given if not any(parent in given for parent in path.parents)]
    with writing(out):
        texts = [text for path in roots if (text := _overlap(out, path))]
        texts += _obstacles(out, overwrite, resume, locked)
        return [*told(Code.OUTPUT, texts, str(out)), *_no_place(out, needed_bytes)]


def _obstacles(out: Path, overwrite: bool, resume: bool, locked: bool) -> list[str]:
    partial = _partial(out)
    problems = []
    if out.exists() and not out.is_dir():
        problems.append(f"{out} is a file; choose another name for the output folder")
    elif os.path.ismount(out):
        problems.append(f"{out} is a mount point and cannot be replaced; choose a folder inside it")
    elif out.is_dir() and not overwrite and system.call(os.listdir, out):
        problems.append(f"{out} exists and is not empty; choose another folder or pass --overwrite")

    user = None if locked else holder(_lock_path(out))
    if user is not None:
        problems.append(in_use(out, user))
    elif partial.exists() and not _is_ours(partial):
        problems.append(f"{partial} is in the way and was not made by weightsmith; move it elsewhere")
    elif (partial / "files").exists() and not (resume or overwrite):
        problems.append(
            f"{partial}: a previous run was interrupted; pass --resume to continue it or --overwrite to start anew"
        )
    return problems


def _no_place(out: Path, needed_bytes: int) -> Iterator[Problem]:
    """What is wrong with the folder that `out` is to be made in, and its disk."""
    ground, partial = next(folder for folder in out.parents if folder.exists()), _partial(out)
    if not ground.is_dir():
        text = f"{ground} is a file, so {out} cannot be made inside it; choose another folder"
        yield Problem(Code.OUTPUT, str(out), text)
    elif not os.access(ground, os.W_OK | os.X_OK):
        yield Problem(Code.OUTPUT, str(out), f"{ground} is not writable; choose another folder")
    else:
        free = system.call(shutil.disk_usage, ground).free + (allocated(partial) if _is_ours(partial) else 0)
        if needed_bytes > free:
            text = f"{out} needs {gigabytes(needed_bytes)}, but {gigabytes(free)} are free on its disk; "
            yield Problem(Code.DISK, str(out), text + "free some space or choose another folder")


def tidy(out: Path) -> None:
    """Remove what a run that made `out` and was stopped right after it has left beside it."""
    out = absolute(out)
    if _partial(out).exists() or _lock_path(out).exists():
        lock = FolderLock(_lock_path(out), out)
        lock.acquire()
        try:
            if _recover(out) is None and _is_ours(_partial(out)):
                with writing(out):
                    _discard(_partial(out))
        finally:
            lock.release()


def _recover(out: Path) -> State | None:
    """Tidy up after a run that ended in `finish`; return the journal of one that ended before.  Needs the lock."""
    partial = _partial(out)
    state = read_journal(partial / "journal.jsonl")
    if state is None:
        return None
    with writing(out):
        old = out.with_name(state.replaces) if state.replaces else None
        done = not (partial / "files").exists()  # it is OUT now
        if old is not None and old.exists():
            if done:
                remove(old)
            elif not out.exists():
                system.call(old.rename, out)
                sync_folder(out.parent)
        if done:
            _discard(partial)
            return None
    return state


def _overlap(out: Path, path: Path) -> str | None:
    for place in (out, _partial(out)):
        if _same(place, path):
            return f"{place} is also an input; choose another output folder"
        if any(_same(place, parent) for parent in path.parents):
            return f"{place} holds the input {path}; choose another output folder"
    if any(_same(path, parent) for parent in out.parents):
        return f"{out} lies inside the input {path}; choose another output folder"
    return None


def _same(a: Path, b: Path) -> bool:
    """Whether two paths are one place: also through a bind mount, or where upper and lower case are alike."""
    return a == b or (a.exists() and b.exists() and a.samefile(b))


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _lock_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial.lock")


def _is_ours(partial: Path) -> bool:
    """Whether a work folder holds nothing but what `begin` makes (it may have been cut short anywhere)."""
    return partial.is_dir() and set(system.call(os.listdir, partial)) <= {"files", "journal.jsonl", "journal.new"}


def _discard(partial: Path) -> None:
    """Remove a work folder.  The journal first: without it, what a kill leaves of the rest is not taken for a run."""
    system.call((partial / "journal.jsonl").unlink, missing_ok=True)
    remove(partial)
