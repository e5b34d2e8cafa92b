"""`weightsmith verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from weightsmith.cli.options import Json
from weightsmith.cli.show import say, show_json

__all__ = ["verify"]


def verify(
    out: Annotated[Path, Parameter(help="Folder that merge or compress has written.")],
    /,
    *,
    rerun: Annotated[bool, Parameter(help="Also merge again and compare the bytes (writes nothing).")] = False,
    json: Json = False,
) -> int:
    """See whether a result is as it was written: every checksum, no file missing or added."""
    from weightsmith.io.manifest import verify_folder

    problems = list(verify_folder(out))
    if rerun:
        from weightsmith.io.open import folder_kind

        if folder_kind(out) == "moe":
            from weightsmith.moe.build import rerun as run_again
        else:
            from weightsmith.run.verify import rerun as run_again
        problems += run_again(out)
    if json:
        show_json({"out": out, "ok": not problems, "rerun": rerun, "problems": problems})
    elif problems:
        say(f"{out}: {len(problems)} problem{'s' if len(problems) != 1 else ''}:")
        for problem in problems:
            say(f"  - {problem}")
    else:
        say(f"{out}: as it was written" + (", and the recipe gives the same bytes again" if rerun else ""))
    return 2 if problems else 0
