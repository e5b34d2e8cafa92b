"""What a short run loads: bounds, so that it does not grow unseen, and that nothing is lost by what comes later."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench.start import models

MOST = {"merge": (168, 475), "plan": (166, 466)}
"""Modules of weightsmith, and all, that a tiny run may load; the figures are those of the day and a few more."""

_COUNT = """
import json, sys
from weightsmith.cli.main import main
code = main()
print(json.dumps([code, sum(name.startswith("weightsmith") for name in sys.modules), len(sys.modules),
                  sorted({"torch", "numba", "cyclopts", "rich", "logging", "concurrent.futures"} & set(sys.modules))]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models(tmp_path)
    return tmp_path


@pytest.mark.parametrize("verb", MOST)
def test_a_tiny_run_loads_few_modules(folder: Path, verb: str) -> None:
    words = {
        "merge": ["merge", f"{folder}/ties.yaml", f"{folder}/out", "--quiet"],
        "plan": ["plan", f"{folder}/ties.yaml"],
    }
    code, ours, every, heavy = json.loads(_printed(_COUNT, *words[verb]).splitlines()[-1])
    assert code == 0
    assert heavy == []
    most_ours, most = MOST[verb]
    assert max(ours - most_ours, every - most) <= 0, f"{verb} loads {ours} modules of weightsmith, {every} in all"


def test_what_comes_later_is_there() -> None:
    """Dataclasses behave as ever, and modules that stand-ins hold the place of are the real ones once asked for."""
    text = """
from weightsmith.cli.process import own_process
own_process()
import dataclasses, inspect, pickle, sys, tempfile
assert "numpy" not in sys.modules
@dataclasses.dataclass(frozen=True, order=True)
class Point:
    x: int
    y: int = 2
@dataclasses.dataclass(frozen=True, slots=True)
class Named(Point):
    name: str = "a"
assert repr(Point(1)) == "Point(x=1, y=2)" and Point(1) == Point(1, 2) != Point(2) and Point(1) < Point(2)
assert len({Point(1), Point(1)}) == 1 and dataclasses.replace(Named(1), y=3) == Named(1, 3)
assert str(inspect.signature(Point)) == "(x: int, y: int = 2) -> None"
assert Point.__init__.__qualname__ == "Point.__init__"
for change in (lambda: setattr(Point(1), "x", 2), lambda: delattr(Named(1), "x")):
    try: change()
    except dataclasses.FrozenInstanceError: pass
    else: raise SystemExit("not frozen")
assert pickle.loads(pickle.dumps(Named(1, 2, "b"))) == Named(1, 2, "b")
import numpy as np, numpy.typing
from pydantic_core import core_schema
assert numpy.typing.NDArray[np.float32] is not None and numpy._typing._array_like.NDArray is numpy.typing.NDArray
assert core_schema.int_schema() == {"type": "int"} and sys.modules["pydantic_core.core_schema"].__file__
assert tempfile.gettempdir() and sys.modules["tempfile"].__file__
print("there")
"""
    assert _printed(text) == "there\n"


def _printed(text: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", text, *words], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout
