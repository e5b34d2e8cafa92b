"""Environments of other libraries, each with a python of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["PACKAGES", "ROOT", "python_of"]

ROOT = Path(__file__).parent.parent.parent
PACKAGES = {"lm_eval": ["lm-eval==0.4.13", "accelerate"], "mteb": ["mteb==2.26.24", "sentence-transformers==6.2.0"]}


def python_of(harness: str) -> str:
    """A python that has lm_eval or mteb: that which WEIGHTSMITH_HARNESS names, else one made in .bench/harness once."""
    if given := os.environ.get("WEIGHTSMITH_HARNESS"):
        return given
    place = ROOT / ".bench" / "harness" / harness
    found = place / "bin" / "python"
    if not (place / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [found, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        wanted = [*PACKAGES[harness], "transformers==5.23.0"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", *wanted], check=True)
        (place / "ready").touch()
    return str(found)
