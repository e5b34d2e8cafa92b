"""How soon things begin: what is imported for them, and how long a plan for a large model takes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from bench.capacity import MODELS, hollow
from safetensors.torch import save_file

HEAVY = (
    *("torch", "transformers", "peft", "accelerate", "scipy", "sklearn", "plotly", "ray", "gguf"),
    *("huggingface_hub", "fsspec", "aiohttp", "requests", "httpx", "pandas", "matplotlib"),
)
UNASKED = (
    *(*HEAVY, "cyclopts", "attr", "rich", "numba", "llvmlite", "asyncio", "ssl", "multiprocessing", "http", "email"),
    *("urllib.request", "importlib.metadata", "tarfile", "zipfile", "unittest", "sqlite3", "xml", "csv"),
)
"""What no merge of local files by the kernels asks for."""
SECONDS = 3.0  # of processor time, for `weightsmith plan` on 70 billion parameters; measured: 1.1


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three experts of 141 GB each: headers, and holes for the data."""
    root = tmp_path_factory.mktemp("large")
    for name in ("base", "a", "b", "c"):
        assert 25 <= len(list(hollow(root / name, MODELS["70B"]).glob("*.safetensors"))) <= 35
    assert sum(path.stat().st_blocks * 512 for path in root.rglob("*")) < 10_000_000, "the files are not sparse here"
    return root


def ran(*words: str, watched: Sequence[str] = HEAVY) -> tuple[float, set[str], str]:
    """(processor seconds, watched modules loaded, output) of the command line in a process of its own."""
    code = (
        "import sys; from weightsmith.cli.main import main; code = main();"
        f"print('LOADED', *(m for m in {tuple(watched)!r} if m in sys.modules)); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said, _, loaded = done.stdout.rpartition("LOADED")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, set(loaded.split()), said


@pytest.mark.parametrize("method", ["ties", "linear", "[{dare: {density: 0.5}}, ties, lines]"])
def test_a_plan_for_70_billion_parameters(large: Path, method: str) -> None:
    recipe = large / "recipe.yaml"
    recipe.write_text(f"base: ./base\nmodels: {{a: ./a, b: ./b, c: ./c}}\nmethod: {method}\n")
    seconds, loaded, said = ran("plan", str(recipe), "--json")
    assert json.loads(said)["output"]["parameters"] == 70_553_706_496
    assert loaded == set()
    assert seconds < SECONDS


def test_a_merge_by_the_kernels_loads_nothing_else(tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        made = {"model.layers.0.mlp.up_proj.weight": torch.randn(40, 30).bfloat16()}
        save_file(made, tmp_path / name / "model.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: ./base\nmodels: {a: ./a, b: ./b}\nmethod: ties\n")
    assert ran("merge", str(recipe), str(tmp_path / "warm"), "--quiet")[1] == set()
    seconds, loaded, _ = ran("merge", str(recipe), str(tmp_path / "out"), "--quiet", watched=UNASKED)
    assert loaded == set()
    assert seconds < 2.5


@pytest.mark.parametrize("words", [("--help",), ("merge", "--help"), ("methods", "ties"), ("schema",)])
def test_help_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    assert ran(*words)[1] == set()
