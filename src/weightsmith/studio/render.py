"""Pages: templates filled in, everything that comes from a file as text, never as markup."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from weightsmith import __version__
from weightsmith.core.errors import MissingExtra
from weightsmith.report.units import duration, roughly, size

__all__ = ["PAGES", "address", "rendered"]

HERE = Path(__file__).parent
PAGES = (
    ("models", "Models"),
    ("recipe", "Recipe"),
    ("run", "Run"),
    ("inspect", "Inspect"),
    ("compare", "Compare"),
    ("grid", "Grid"),
    ("fronts", "Fronts"),
    ("history", "History"),
)
"""Path -> name, in the order of the menu."""


def address(page: str, /, **query: Any) -> str:
    """A path of the studio with a query."""
    given = {name: value for name, value in query.items() if value not in (None, "")}
    return f"/{page.lstrip('/')}" + (f"?{urlencode(given, doseq=True)}" if given else "")


def rendered(template: str, **values: Any) -> str:
    """A template of this package as HTML."""
    return str(_environment().get_template(template).render(**values))


@cache
def _environment() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("jinja2", "studio", "the studio") from error
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.globals |= {"address": address, "pages": PAGES, "version": __version__, "json": _json}
    made.filters |= {
        "size": size, "duration": duration, "roughly": roughly, "ago": _ago, "count": _count, "number": _number,
        "percent": _percent, "shell": shlex.quote,
    }  # fmt: skip
    return made


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _ago(moment: float) -> str:
    passed = max(0.0, time.time() - moment)
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if passed >= length:
            count = int(passed // length)
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return "just now"


def _count(value: int) -> str:
    """A number of things: 7.2B, 340M, 12,000."""
    for length, unit in ((1e9, "B"), (1e6, "M")):
        if value >= length:
            return f"{value / length:.3g}{unit}"
    return f"{value:,}"


def _number(value: Any, digits: int = 4) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}g}" if math.isfinite(value) else "∞"
    return str(value)


def _percent(value: Any, digits: int = 1) -> str:
    """A share; one that would round to nothing in its first two digits, so that 0 means none."""
    if value is None:
        return "–"
    rounded = f"{100 * value:.{digits}f}%"
    return f"{100 * value:.2g}%" if value and not rounded.strip("-0.%") else rounded


Values = Mapping[str, Any]
