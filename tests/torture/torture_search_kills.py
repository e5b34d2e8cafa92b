"""Searches by every sampler, killed at random moments: `make torture`."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from search.pantry import stocked, tree
from search.test_search_models import SEARCH, kitchen
from search.test_search_run import SAMPLERS
from weightsmith.search.samplers.known import SAMPLERS as ALL

__all__ = ["kitchen"]

KILLS = 5
MAP = {"points": 12, "link": {"a": "identity", "b": "softplus"}}


@pytest.mark.parametrize("sampler", ALL)
def test_kill_9_at_random_moments(sampler: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The same command, as often as it takes, ends with the history and the recipe of a run that nobody killed."""
    if sampler == "frank_wolfe":
        file = request.getfixturevalue("kitchen") / "killed.yaml"
        file.write_text(SEARCH.replace("evaluations: 3", "evaluations: 6"))
    else:
        goals = {"a": "max", "b": "min"} if sampler in ("nsga2", "nsga3", "map") else {"near": "max"}
        options = MAP if sampler == "map" else SAMPLERS[sampler]
        more = {"evaluations": 18, "batch": 3, "together": 2, "controls": True}
        file = tmp_path / "search.yaml"
        file.write_text(yaml.safe_dump(tree(stocked(tmp_path), sampler={sampler: options}, goals=goals, **more)))
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = [sys.executable, "-m", "weightsmith", "search", str(file), str(out), "--quiet"]
    began = time.monotonic()
    subprocess.run(words, check=True)
    out.rename(whole)  # keys of recipes that name tables in it hang on its path
    took, draw, killed = time.monotonic() - began, random.Random(sampler), 0
    while killed < KILLS:
        process = subprocess.Popen(words)
        try:
            assert process.wait(took * draw.uniform(0.2, 0.9)) == 0
            break  # the rest was less than that
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    subprocess.run(words, check=True)
    assert killed
    for name in ("history.jsonl", "recipe.yaml"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (out / "candidates").exists()
