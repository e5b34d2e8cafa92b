"""The parts for training on real data, each beside what it is published to beat.

    python -m study.train --data FOLDER                 an hour of one core; what is measured is kept, so it goes on
    python -m study.train --data FOLDER --only styles   some of the parts

FOLDER holds gsm8k_train.jsonl, gsm8k_test.jsonl, humaneval.jsonl.gz, tinyshakespeare.txt, cifar10_12k.npz,
sign_digits.npz and omniglot8.npz.  Tables are printed in Markdown: means over seeds, standard deviations in brackets.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

HOME = Path(__file__).resolve().parents[2] / ".study" / "train"
PARTS = ("fusing", "styles", "optimizers", "adapters", "tasks")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print."""
    import torch
    from transformers.utils import logging

    from study.train.cells import Room

    parser = argparse.ArgumentParser(prog="python -m study.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the images and texts")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    parser.add_argument("--home", type=Path, default=HOME, help="where figures and models are kept")
    parser.add_argument("--short", action="store_true", help="a few steps, to see that it works")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for name in chosen.only:
        part = importlib.import_module(f"study.train.{name}")
        sys.stdout.write(f"\n## {name}\n\n{part.study(Room(chosen.data, chosen.home, chosen.short))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
