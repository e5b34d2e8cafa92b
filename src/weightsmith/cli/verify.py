"""`weightsmith verify`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from weightsmith.cli.options import Json, Plugins
from weightsmith.cli.show import say, show_json
from weightsmith.cli.words import Parameter

if TYPE_CHECKING:
    from weightsmith.io.url import Url

__all__ = ["verify"]

_MAKERS = {"moe": "moe.build", "shrunk": "experts.shrink", "calibrated": "experts.calibrate"}


def verify(
    out: Annotated[Path, Parameter(help="Folder (or URL) that merge or compress has written; or that of a sweep.")],
    /,
    *,
    rerun: Annotated[bool, Parameter(help="Also merge again and compare the bytes (writes nothing).")] = False,
    json: Json = False,
    plugin: Plugins = (),
) -> int:
    """See whether a result is as it was written: every checksum, no file missing or added."""
    from weightsmith.io.url import place_of
    from weightsmith.jobs.sweep import variants_in
    from weightsmith.plugins import load_file

    for file in plugin:
        load_file(file)
    place = place_of(out)
    variants = variants_in(place) if isinstance(place, Path) else {}
    found = {name: _problems(folder, rerun) for name, folder in variants.items()} or {"": _problems(place, rerun)}
    wrong = any(found.values())
    if json:
        each = {name: {"ok": not problems, "problems": problems} for name, problems in found.items()}
        said = {"variants": each} if variants else {"problems": found[""]}
        show_json({"out": place, "ok": not wrong, "rerun": rerun, **said})
    for name, problems in found.items() if not json else ():
        fine = "as it was written" + (", and the recipe gives the same bytes again" if rerun else "")
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}:"
        say(f"{place / name if name else place}: {count if problems else fine}")
        for problem in problems:
            say(f"  - {problem}")
    return 2 if wrong else 0


def _problems(place: Path | Url, rerun: bool) -> list[str]:
    from weightsmith.io.package.manifest import read_manifest, verify_folder

    problems = list(verify_folder(place))
    if rerun:  # those of mc_smoe are compressed folders, made by shrink
        kind = "shrunk" if "shrink" in (made := read_manifest(place)).get("recipe", ()) else made["kind"]
        problems += importlib.import_module(f"weightsmith.{_MAKERS.get(kind, 'jobs.verify')}").rerun(place)
    return problems
