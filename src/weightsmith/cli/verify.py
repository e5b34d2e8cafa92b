"""`weightsmith verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from weightsmith.cli.options import Json, Plugins
from weightsmith.cli.show import say, show_json
from weightsmith.cli.words import Parameter

__all__ = ["verify"]


def verify(
    out: Annotated[Path, Parameter(help="Folder (or URL) that merge or compress has written.")],
    /,
    *,
    rerun: Annotated[bool, Parameter(help="Also merge again and compare the bytes (writes nothing).")] = False,
    json: Json = False,
    plugin: Plugins = (),
) -> int:
    """See whether a result is as it was written: every checksum, no file missing or added."""
    from weightsmith.io.package.manifest import read_manifest, verify_folder
    from weightsmith.io.url import place_of
    from weightsmith.plugins import load_file

    for file in plugin:
        load_file(file)
    place = place_of(out)
    problems = list(verify_folder(place))
    if rerun:
        if read_manifest(place)["kind"] == "moe":
            from weightsmith.moe.build import rerun as run_again
        else:
            from weightsmith.jobs.verify import rerun as run_again
        problems += run_again(place)
    if json:
        show_json({"out": place, "ok": not problems, "rerun": rerun, "problems": problems})
    elif problems:
        say(f"{place}: {len(problems)} problem{'s' if len(problems) != 1 else ''}:")
        for problem in problems:
            say(f"  - {problem}")
    else:
        say(f"{place}: as it was written" + (", and the recipe gives the same bytes again" if rerun else ""))
    return 2 if problems else 0
