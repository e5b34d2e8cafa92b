"""mergekit 0.1.5 in a virtual environment of its own, so that its requirements stay out of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.measure import BenchError

__all__ = ["PACKAGES", "command", "mergekit_python"]

PACKAGES = ("torch==2.13.0", "mergekit==0.1.5")
"""One after the other: torch first and by itself decides which of its large companions are pulled in."""


def mergekit_python(folder: Path) -> Path:
    """The interpreter that has mergekit: MERGEKIT_PYTHON, or the environment in `folder`, made if it is not there."""
    given = os.environ.get("MERGEKIT_PYTHON")
    if given:
        if not Path(given).exists():
            raise BenchError(f"MERGEKIT_PYTHON={given} does not exist; unset it, or name a Python that has mergekit")
        return Path(given)
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        print(f"setting up {PACKAGES[-1]} in {folder} (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for package in PACKAGES:
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package]
            subprocess.run(install, check=True)
        done.touch()
    return python


def command(python: Path, config: Path, out: Path) -> list[str]:
    """One merge as its users start it; the tokenizer is left out (there is none) and so is the model card."""
    program = python.with_name("mergekit-yaml")
    return [str(program), str(config), str(out), "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
