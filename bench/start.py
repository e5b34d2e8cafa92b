"""What it costs to begin: python -m bench.start OTHER [--repeat 20]

Merges two models of 64 kB, of which nearly all is start, and asks for a plan and for help: with this checkout and with
OTHER, in turn, by the same Python.  The figures are processor seconds of whole processes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from bench.measure import BenchError, measure, plain_environment
from bench.table import markdown, ratio

__all__ = ["cases", "main", "models"]

ROWS, COLUMNS = 128, 256  # of bfloat16: 64 kB


def models(folder: Path) -> None:
    """Write the models `base`, `a` and `b`, and a recipe of each kind."""
    tensor = {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [0, 2 * ROWS * COLUMNS]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": tensor}).encode()
    for seed, name in enumerate(("base", "a", "b")):
        values = np.random.default_rng(seed).standard_normal(ROWS * COLUMNS, dtype=np.float32)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bits)
    (folder / "linear.yaml").write_text("models: {a: ./a, b: ./b}\nmethod: linear\n")
    (folder / "ties.yaml").write_text("base: ./base\nmodels: {a: ./a, b: ./b}\nmethod: ties\n")


def cases(folder: Path) -> Mapping[str, list[str]]:
    """What is measured: a name, and the words behind `weightsmith`."""
    merge = ["--quiet", "--overwrite"]
    return {
        "merge, linear": ["merge", f"{folder}/linear.yaml", f"{folder}/out", *merge],
        "merge, TIES": ["merge", f"{folder}/ties.yaml", f"{folder}/out", *merge],
        "plan, TIES": ["plan", f"{folder}/ties.yaml"],
        "merge --help": ["merge", "--help"],
        "--help": ["--help"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.start", description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="another checkout, the yardstick")
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args(arguments)
    here = Path(__file__).parent.parent
    try:
        with tempfile.TemporaryDirectory() as folder:
            models(Path(folder))
            rows = [
                [name, *_compared(words, here, options.other.absolute(), options.repeat)]
                for name, words in cases(Path(folder)).items()
            ]
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(markdown([["command", "CPU s, here", "CPU s, other", "ratio, pair by pair"], *rows]))
    return 0


def _compared(words: Sequence[str], here: Path, other: Path, repeat: int) -> list[str]:
    _cpu(words, here), _cpu(words, other)  # once for the caches
    pairs = [(_cpu(words, here), _cpu(words, other)) for _ in range(repeat)]
    ours, theirs = zip(*pairs, strict=True)
    found = ratio(ours, theirs)
    return [f"{median(ours):.3f}", f"{median(theirs):.3f}", f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"]


def _cpu(words: Sequence[str], checkout: Path) -> float:
    """Processor seconds of a command with the source of this checkout."""
    environment = {**plain_environment(), "PYTHONPATH": str(checkout / "src")}
    return measure([sys.executable, "-m", "weightsmith", *words], environment).cpu


if __name__ == "__main__":
    sys.exit(main())
