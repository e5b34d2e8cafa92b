"""What data tasks read: what is tested must not be what coefficients are chosen on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.study.evaluate import digest
from weightsmith.study.evaluators.lines import read_lines

if TYPE_CHECKING:
    from weightsmith.study.suite_file import Bound

__all__ = ["chosen_on_tests", "overlaps", "unlimited"]


def chosen_on_tests(tasks: Mapping[str, Bound]) -> Iterator[tuple[str, str]]:
    """(proxy, task) of every proxy whose data are tested: the same, or half of its examples or more."""
    for proxy, test, shared, count in _pairs(tasks):
        if 2 * shared >= count:
            yield proxy, test


def overlaps(tasks: Mapping[str, Bound]) -> Iterator[str]:
    """A line for every proxy that has some examples of a task that is tested, but fewer than half."""
    for proxy, test, shared, count in _pairs(tasks):
        if 0 < 2 * shared < count:
            yield f"{shared} of the {count} examples of the proxy {proxy} are tested in {test}, too"


def unlimited(tasks: Iterable[Bound]) -> Iterator[str]:
    """A line for the tasks whose evaluators a limit does not reach."""
    if names := [one.name for one in tasks if not one.spec.limited()]:
        yield f"{', '.join(names)}: measured whole, for the limit does not reach {'them' if len(names) > 1 else 'it'}"


def _pairs(tasks: Mapping[str, Bound]) -> Iterator[tuple[str, str, int, int]]:
    """(proxy, tested task, examples of the proxy that both have, examples of the proxy)."""
    tested = {name: one for name, one in tasks.items() if one.task.role in ("test", "held-out")}
    proxies = {name: one for name, one in tasks.items() if one.task.role == "proxy"}
    rows = {name: _rows(one) for name, one in (tested | proxies).items()} if proxies else {}
    for proxy, one in proxies.items():
        for test, other in tested.items():
            mine, theirs = rows[proxy], rows[test]
            if mine is not None and theirs is not None:
                yield proxy, test, len(mine & theirs), len(mine)
            else:
                yield proxy, test, int(_named(one) == _named(other)), 1


def _rows(one: Bound) -> frozenset[str] | None:
    """The examples of a file of JSON lines, however they are written down; None of other data."""
    file = getattr(one.spec, "file", None)
    if not isinstance(file, str) or not file.endswith((".jsonl", ".jsonl.gz")):
        return None
    return frozenset(json.dumps(item, sort_keys=True) for item in read_lines(Path(file)))


def _named(one: Bound) -> Any:
    """What a task reads, whatever it is called."""
    files = sorted(digest(path) for path in one.spec.files() if path.is_file())
    if files and one.kind != "program":
        return files
    if one.kind == "svg":  # the scenes of a seed are the same for every number of them
        return [one.kind, one.spec.task, one.spec.seed]
    if one.kind in ("lm_eval", "mteb"):
        return [one.kind, one.spec.task, getattr(one.spec, "include", None)]
    return [one.kind, one.spec.model_dump(mode="json", exclude={"seconds"}),
            one.name if "{task}" in getattr(one.spec, "command", "") else ""]  # fmt: skip
