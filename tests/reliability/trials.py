"""Ways to end a run, each tried many times, and what must hold after each.

After every trial OUT is what it was or complete (`runs.state`), and the same command with --resume ends with exit
code 0, the bytes of an undisturbed run, and nothing left over beside them (`runs.finish`).
"""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reliability.runs import Ended, Scene, Zygote, finish, put_old, state
from weightsmith.io.write.journal import read_journal

ERRORS = ("EIO", "ENOSPC", "EIO for good", "ENOSPC for good", "short", "short for good")


def new_place(folder: Path, old: bool) -> tuple[Path, dict[str, str] | None, tuple[str, ...]]:
    """An empty folder to merge in, what is there under the output's name, and the options that go with it."""
    place = folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place, put_old(place) if old else None, ("--overwrite",) if old else ()


def calls_of(zygote: Zygote, scene: Scene, folder: Path, old: bool = False, only: str | None = None) -> int:
    """How many calls to the file system an undisturbed run makes; `only`: calls of that function."""
    place, _, more = new_place(folder, old)
    ended = zygote.run(scene.argv(place, *more), fault={"only": only})
    assert ended.code == 0
    assert state(place, scene) == "complete"
    assert ended.calls is not None
    return ended.calls


def kill_anywhere(zygote: Zygote, scene: Scene, folder: Path, count: int, seed: int, old: bool = False) -> Counter[str]:
    """SIGKILL at random moments, `count` times in all; every third run is left to its end, resumed after kills."""
    chance, seen = random.Random(seed), Counter[str]()
    place, before, more = new_place(folder, old)
    whole = zygote.run(scene.argv(place, *more)).seconds
    while seen["kills"] < count:
        place, before, more = new_place(folder, old)
        for attempt in range(3):
            argv = scene.again(place) if attempt else scene.argv(place)
            moment = {"number": signal.SIGKILL, "after": chance.uniform(0, whole)}
            ended = zygote.run([*argv, *more], signal=moment)
            seen["kills"] += ended.code == -signal.SIGKILL
            found = state(place, scene, before)
            seen[f"then {found}"] += 1
            if ended.code == 0:
                break
            assert ended.code == -signal.SIGKILL, ended
        finish(zygote, scene, place, *more)
    return seen


def end_at(
    zygote: Zygote,
    scene: Scene,
    folder: Path,
    kind: str,
    numbers: Iterable[int],
    old: bool = False,
    only: str | None = None,
    **patch: Any,
) -> Counter[str]:
    """End the run at the n-th call (`only`: of that function) for each of some n: `kill`, `torn` or `power`."""
    seen = Counter[str]()
    for n in numbers:
        place, before, more = new_place(folder, old)
        ended = zygote.run(
            scene.argv(place, *more),
            fault={"kind": kind, "at": n, "seed": n, "only": only},
            patch={"boot": "one", **patch},
        )
        assert ended.code in (0, -signal.SIGKILL), (n, ended)
        seen["kills"] += ended.code != 0
        seen[f"then {state(place, scene, before)}"] += 1
        finish(zygote, scene, place, *more, patch={"boot": "two" if kind == "power" else "one", **patch})
    return seen


def fail_at(
    zygote: Zygote, scene: Scene, folder: Path, cases: Iterable[tuple[int, str]], old: bool = False
) -> Counter[str]:
    """Let the n-th call (or, 'for good', every call from it on) fail or fall short."""
    seen = Counter[str]()
    for n, kind in cases:
        place, before, more = new_place(folder, old)
        ended = zygote.run(scene.argv(place, *more), fault=_fault(n, kind))
        found = state(place, scene, before)
        assert_said(ended, (n, kind, found))
        seen["calls failed"] += 1
        seen[f"then {found}, exit {ended.code}"] += 1
        if ended.code == 0:
            assert found == "complete", (n, kind)
        else:
            assert not kind.startswith("short"), (n, kind, ended)  # half a transfer is no error
        finish(zygote, scene, place, *more)
    return seen


def fail_resume_at(zygote: Zygote, scene: Scene, folder: Path, cases: Iterable[tuple[int, str]]) -> Counter[str]:
    """The same in a run that resumes another: whatever fails, no finished task is lost."""
    seen = Counter[str]()
    ready = folder / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    middle = kill_where(zygote, scene, ready, 1)
    for n, kind in cases:
        place, _, _ = new_place(folder, False)
        shutil.copytree(ready, place, dirs_exist_ok=True)
        ended = zygote.run(scene.argv(place, "--resume"), fault=_fault(n, kind))
        found = state(place, scene)
        assert_said(ended, (n, kind, found))
        if found == "absent":
            assert tasks_in(place) >= middle, (n, kind)
        seen["calls failed"] += 1
        finish(zygote, scene, place)
    return seen


def kill_where(zygote: Zygote, scene: Scene, place: Path, least: int) -> int:
    """Kill a run in `place` as soon as its journal holds `least` tasks or a few more; returns their number."""
    low, high = 1, calls_of(zygote, scene, place.parent)
    while True:  # the number of tasks grows with the number of calls, until the journal goes
        n = (low + high) // 2
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        zygote.run(scene.argv(place), fault={"kind": "kill", "at": n})
        if (place / "out").exists():
            high = n
        elif (found := tasks_in(place)) < least:
            low = n + 1
        elif found < least + 3 or low >= high:
            return found
        else:
            high = n


def tasks_in(place: Path) -> int:
    state = read_journal(place / "out.partial/journal.jsonl")
    return len(state.tasks) if state is not None else 0


def assert_said(ended: Ended, case: object) -> None:
    """A failure is one line that names what failed; nothing is called an internal error."""
    if ended.code == 0:  # what the look at the finished result could not read is a warning
        assert all(line.startswith("warning: ") for line in ended.stderr.splitlines()), (case, ended)
        return
    assert ended.code == 2, (case, ended)
    assert ended.stderr.startswith("error: "), (case, ended)
    assert ended.stderr.count("\n") == 1 or "problems:" in ended.stderr, (case, ended)
    assert "Traceback" not in ended.stderr


def _fault(n: int, kind: str) -> dict[str, Any]:
    return {"kind": kind.removesuffix(" for good"), "at": n, "lasting": kind.endswith("for good")}
