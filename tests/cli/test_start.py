"""What a short run loads: bounds, so that it does not grow unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench.start import models

MOST = {"merge": (168, 488), "plan": (166, 486)}
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


def _printed(text: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", text, *words], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout
