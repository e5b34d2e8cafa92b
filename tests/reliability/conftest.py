"""Scenes, and the process whose children run them."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reliability.runs import Scene, Zygote, make_scene
from reliability.writers import make_writers


@pytest.fixture(scope="session", autouse=True)
def usual_signals() -> None:
    """What nohup and background jobs ignore, and their children with them, is not ignored here."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    """tiny: few calls, on one thread, by the kernels; torch: the same through torch; wide: 16 MB read, two threads."""
    folder = tmp_path_factory.mktemp("scenes")
    one = ("--threads", "1")
    piped = "[{dare: {density: 0.5}}, {ties: {density: 0.5}}]"
    return {
        "tiny": make_scene(folder / "tiny", "ties", hidden=16, layers=0, shard="700B", shards=1, options=one),
        "torch": make_scene(folder / "torch", piped, hidden=16, layers=0, shard="700B", options=one),
        "wide": make_scene(
            folder / "wide", "ties", hidden=192, layers=6, shard="1MB", shards=3, options=("--threads", "2")
        ),
    }


@pytest.fixture(scope="session")
def zygote(scenes: dict[str, Scene], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("zygote"), list(scenes.values()))
    yield made
    made.close()


@pytest.fixture(scope="session")
def writers(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    """compress, restore, moe, moe shrink, lora merge, tokenizer transplant, and a sweep."""
    made = make_writers(tmp_path_factory.mktemp("writers") / "made")
    for scene in made.values():
        zygote.warm(scene)
    return made


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Callable[[str, Counter[str]], None]:
    """Adds to the figures that are shown at the end: what was tried, and how it went."""

    def add(what: str, seen: Counter[str]) -> None:
        record_property("figures", (what, dict(seen)))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    figures: dict[str, Counter[str]] = {}
    for report in [*terminalreporter.stats.get("passed", []), *terminalreporter.stats.get("failed", [])]:
        for name, value in report.user_properties:
            if name == "figures":
                figures.setdefault(value[0], Counter()).update(value[1])
    lines = [
        f"{what}: {', '.join(f'{n} {word}' for word, n in sorted(seen.items()))}" for what, seen in figures.items()
    ]
    for line in lines:
        terminalreporter.write_line(line)
    if lines and (path := os.environ.get("WEIGHTSMITH_FIGURES")):
        Path(path).write_text("\n".join(lines) + "\n")
