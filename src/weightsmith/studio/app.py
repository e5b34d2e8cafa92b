"""The application: every address and the function that answers it."""

from __future__ import annotations

import importlib
import mimetypes
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from weightsmith.core.errors import MissingExtra, WeightsmithError, problems_of
from weightsmith.io import system
from weightsmith.studio.asked import Asked, Studio
from weightsmith.studio.drafts import ClashError
from weightsmith.studio.jobs import Jobs
from weightsmith.studio.places import OutsideError, Places
from weightsmith.studio.render import HERE, rendered
from weightsmith.studio.security import Guard

__all__ = ["build"]


_NONE = dict.fromkeys(("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False)
"""FastAPI records requests for OpenTelemetry, to be sent where the environment says, unless told not to."""


def build(folders: tuple[Path, ...], token: str, port: int, evaluator: str = "") -> Guard:
    """The ASGI application for some folders; it begins to work through the queue when it is started."""
    try:
        from fastapi import FastAPI
    except ImportError as error:
        raise MissingExtra("fastapi", "studio", "the studio") from error
    from weightsmith.studio import pages

    places = Places.of(folders)
    studio = Studio(places, Jobs(places.state, places.home), evaluator)
    os.environ["HF_HUB_OFFLINE"] = "1"  # of this process: a plan that is made while somebody types downloads nothing

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        studio.jobs.open()
        threading.Thread(target=_warm, daemon=True).start()
        yield
        studio.jobs.close()

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan, telemetry=_NONE)
    app.state.studio = studio
    app.add_api_route("/static/{name}", _static, response_model=None)
    for method, path, module, function in pages.ROUTES:
        app.add_api_route(path, _answered(module, function), methods=[method], response_model=None)
    app.add_exception_handler(WeightsmithError, _said)
    app.add_exception_handler(404, _lost)
    return Guard(app, token, port)  # outside of all that FastAPI does with a request


def _answered(module: str, name: str) -> Any:
    from fastapi import Request

    def answer(request: Any) -> Any:
        function = getattr(importlib.import_module(f"weightsmith.studio.pages.{module}"), name)
        return function(request.app.state.studio, Asked.of(request))

    answer.__annotations__ = {"request": Request}
    return answer


def _warm() -> None:
    """Import what the next page will need, while the first is looked at."""
    time.sleep(0.5)
    importlib.import_module("weightsmith.studio.pages.recipe")
    importlib.import_module("weightsmith.jobs.merge")


def _static(name: str) -> Any:
    """A file of this package, by its plain name."""
    from fastapi.responses import Response

    there = {path.name: path for path in (HERE / "static").iterdir()}
    if name not in there:
        return Response("no such file", 404)
    kind = mimetypes.guess_type(name)[0] or "text/plain"
    return Response(system.read_file(there[name]), media_type=kind, headers={"cache-control": "max-age=3600"})


def _said(request: Any, error: WeightsmithError) -> Any:
    from fastapi.responses import HTMLResponse

    if isinstance(error, ClashError):
        from weightsmith.studio.pages.recipe import clashing

        return clashing(request.app.state.studio, Asked.of(request), error)
    status = 403 if isinstance(error, OutsideError) else 400
    texts = [problem.text for problem in problems_of(error)]
    name = "problems.html" if request.headers.get("hx-request") == "true" else "error.html"
    return HTMLResponse(rendered(name, problems=texts, title="That did not work", page=""), status)


def _lost(request: Any, error: Exception) -> Any:
    from fastapi.responses import HTMLResponse

    texts = ["There is no such page."]
    return HTMLResponse(rendered("error.html", problems=texts, title="Nothing here", page=""), 404)
