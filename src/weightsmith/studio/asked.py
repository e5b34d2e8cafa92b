"""What every page is given: the folders and the queue, and what was asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from weightsmith.core.errors import RecipeError
from weightsmith.studio.jobs import Jobs
from weightsmith.studio.places import Places
from weightsmith.studio.render import rendered

__all__ = ["Asked", "Studio", "go", "html"]

_DIGITS = 18


@dataclass(frozen=True)
class Studio:
    """What the pages share.

    evaluator  the Python file or command that scores models, named at start; '' if none was
    ending     set as soon as the server is asked to end
    """

    places: Places
    jobs: Jobs
    evaluator: str = ""
    ending: Event = field(default_factory=Event)


@dataclass(frozen=True)
class Asked:
    """What a page was asked: `path` of the address, `query` (the first value of each name), `form` (all values).

    partial  htmx asks for a part of the page
    """

    path: Mapping[str, str]
    query: Mapping[str, str]
    form: Mapping[str, list[str]]
    partial: bool

    @classmethod
    def of(cls, request: Any) -> Asked:
        query = {name: request.query_params.getlist(name)[0] for name in request.query_params}
        partial = request.headers.get("hx-request") == "true"
        return cls(request.path_params, query, request.scope.get("state", {}).get("form", {}), partial)

    def __call__(self, name: str, default: str = "") -> str:
        """A value of the form, else of the query."""
        return self.form.get(name, [self.query.get(name, default)])[0]

    def number(self, name: str, default: int, most: int) -> int:
        """A whole number from 0 to `most`, RecipeError for anything else; the default where none was given."""
        text = self(name).strip()
        if not text:
            return default
        number = int(text) if text.isascii() and text.isdecimal() and len(text) <= _DIGITS else -1
        if not 0 <= number <= most:
            raise RecipeError(f"{name} = {text[:40]}: a whole number from 0 to {most:,} is expected")
        return number


def html(template: str, **values: Any) -> Any:
    """A page as an answer."""
    from fastapi.responses import HTMLResponse

    return HTMLResponse(rendered(template, **values))


def go(where: str, asked: Asked) -> Any:
    """Send the browser to another page."""
    from fastapi.responses import Response

    return Response(status_code=204, headers={"HX-Redirect": where}) if asked.partial else _see(where)


def _see(where: str) -> Any:
    from fastapi.responses import RedirectResponse

    return RedirectResponse(where, 303)
