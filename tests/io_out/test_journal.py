"""The journal: what a reader believes after a crash."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from weightsmith.core.errors import OutputError
from weightsmith.io.write import journal
from weightsmith.io.write.journal import Journal, boot_id, read_journal

HEAD = {"identity": {"recipe": {"ß": [1.5, None]}}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def write(path, count, *, interval=1e9, flush=lambda: None, tasks=None):
    book = Journal(path, HEAD, tasks or {}, flush, interval)
    for i in range(count):
        book.add(f"t{i}", {"parts": [["w", i, i + 1, "ff"]]})
    book.close()


def finished(path, boot=None):
    return list(read_journal(path).finished(boot_id() if boot is None else boot))


def test_what_is_written_is_read(path):
    write(path, 3)
    state = read_journal(path)
    assert state.head == {**HEAD, "boot": boot_id()}
    assert state.finished(boot_id()) == {f"t{i}": {"parts": [["w", i, i + 1, "ff"]]} for i in range(3)}
    assert len(path.read_bytes().splitlines()) == 2 + 3


def test_no_file_or_no_head_is_no_journal(path):
    assert read_journal(path) is None
    path.write_bytes(b"")
    assert read_journal(path) is None
    write(path, 1)
    path.write_bytes(path.read_bytes()[1:])
    assert read_journal(path) is None


def test_every_cut_leaves_the_whole_lines_before_it(path):
    write(path, 3)
    data = path.read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == 10]
    for cut in range(ends[1] + 1, len(data)):
        path.write_bytes(data[:cut])
        assert len(finished(path)) == sum(end <= cut for end in ends[2:])


@pytest.mark.parametrize("tail", [b"\0" * 4096, b'{"xxh3":"', b"\n\n", b'{"task":"t9","record":{}}\n', b"\xff\n"])
def test_a_torn_or_zeroed_tail_is_cut_off(path, tail):
    write(path, 3)
    with path.open("ab") as file:
        file.write(tail)
    assert finished(path) == ["t0", "t1", "t2"]
    write(path, 1, tasks=read_journal(path).finished(boot_id()))
    assert finished(path) == ["t0", "t1", "t2"]
    assert len(path.read_bytes().splitlines()) == 2 + 3 + 1


def test_any_flipped_bit_ends_the_reading(path):
    write(path, 2)
    data = path.read_bytes()
    start = data.index(b"\n", data.index(b"\n") + 1) + 1  # of the first task
    end = data.index(b"\n", start)
    for at in range(start, end):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert finished(path) == []


def test_after_a_reboot_only_flushed_tasks_count(path):
    flushed = []
    write(path, 2, interval=0, flush=lambda: flushed.append(1))
    assert flushed == [1, 1]
    assert finished(path, "another boot") == ["t0", "t1"]
    write(path, 3)
    assert finished(path, "another boot") == []
    write(path, 2, tasks={"t7": {}, "t8": {}})
    assert finished(path, "another boot") == ["t7", "t8"]
    assert finished(path) == ["t7", "t8", "t0", "t1"]


def test_without_a_boot_id_only_flushed_tasks_count(path, monkeypatch):
    monkeypatch.setattr(journal, "boot_id", lambda: "")
    write(path, 2)
    assert finished(path, "") == []


@pytest.mark.parametrize("error", [FileNotFoundError(2, "none"), PermissionError(13, "sandbox")])
def test_a_system_without_a_boot_id(monkeypatch, error):
    monkeypatch.setattr(journal.system, "read_file", raising(error))
    assert boot_id() == ""


def test_a_boot_id_that_cannot_be_read_now_is_an_error(monkeypatch):
    """Taken for none, a resumed run believed no task, and threw away what was finished."""
    monkeypatch.setattr(journal.system, "read_file", raising(OSError(24, "Too many open files")))
    with pytest.raises(OutputError, match="boot_id: Too many open files; run again with --resume"):
        boot_id()


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_tasks_added_during_a_flush_are_not_covered_by_it(path):
    book = Journal(path, HEAD, {}, lambda: None, 0)

    def flush():
        book._interval = 1e9
        book.add("late", {})

    book._flush = flush
    book.add("early", {})
    book.close()
    assert finished(path, "another boot") == ["early"]
    assert finished(path) == ["early", "late"]


def test_threads_do_not_mix_their_lines(path):
    book = Journal(path, HEAD, {}, lambda: None, 0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: book.add(f"t{i}", {"x": "y" * 500}), range(400)))
    book.close()
    assert sorted(finished(path)) == sorted(f"t{i}" for i in range(400))
    assert read_journal(path).synced <= 400


def test_a_failing_flush_is_no_flush(path):
    def flush():
        raise OutputError("disk on fire")

    book = Journal(path, HEAD, {}, flush, 0)
    with pytest.raises(OutputError, match="on fire"):
        book.add("t0", {})
    book.close()
    assert finished(path, "another boot") == []
