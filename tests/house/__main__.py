"""Print the table of the house.

    python -m house             print every figure beside its aim (`make house`)
    python -m house --ratchet   note what has become better in best.json, so that it stays
    python -m house SRC         measure another source tree, the folder that holds `weightsmith`

`test_house.py` fails where a figure is worse than best.json or, once it reached its aim, than the aim.
"""

from __future__ import annotations

import sys
from pathlib import Path

from house.table import ratchet, rows
from house.tree import ROOT, House


def show(house: House) -> None:
    """Print the table, and the imports and calls that run the wrong way."""
    found = rows(house)
    width = max(len(row.what) for row in found)
    print(f"{'':<{width}} {'now':>8} {'aim':>9}")
    for row in found:
        aim = f"{'>=' if row.least else '<='} {row.aim:,g}" if row.aim else "0"
        print(f"{row.what:<{width}} {row.now:>8,g} {aim:>9}  {'' if row.reached else 'missed'}")
    print(f"{sum(row.reached for row in found)} of {len(found)} aims reached")
    for title, wrong in (
        ("imports that run upwards or sideways", [text for texts in house.arrows.values() for text in texts]),
        ("import circles", [" ".join(group) for group in house.circles]),
        ("calls back up", house.back_up),
    ):
        if wrong:
            print(f"\n{title}:", *wrong, sep="\n  ")


def main(words: list[str]) -> None:
    sources = [word for word in words if word != "--ratchet"]
    house = House(Path(sources[0]) if sources else ROOT / "src")
    if "--ratchet" in words:
        ratchet(house)
    show(house)


if __name__ == "__main__":
    main(sys.argv[1:])
