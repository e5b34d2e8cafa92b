"""Loading models that were trained in a tangent space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import OutputError, SourceError
from weightsmith.io.package.tangent import point_of, tangent_of
from weightsmith.io.read.folder import FolderSource
from weightsmith.observe.tangent import Linearized

__all__ = ["in_tangent_space", "refuse_tangent"]


def in_tangent_space(loaded: Any, device: Any, load: Callable[..., Any]) -> Any:
    """A loaded model as it is, or linearised around the point that its folder names.

    load  gives the model of a folder
    Raises SourceError where that point is not there, or is another model by now.
    """
    try:
        tangent = tangent_of(loaded.folder)
    except OutputError as error:
        raise SourceError(str(error)) from None
    if tangent is None:
        return loaded
    said = f"{loaded.label}: linearised around {tangent}"
    if not Path(tangent.model).is_dir():
        raise SourceError(f"{said}, which is not there; it runs only beside that model")
    if point_of(FolderSource(Path(tangent.model))) != tangent.point:
        raise SourceError(f"{said}, but the model in {tangent.model} is another by now")
    origin = load(tangent.model, kind=loaded.kind, device=device)
    made = Linearized(origin.module)
    start = dict(origin.module.named_parameters())
    made.load_delta({name: p.detach() - start[name] for name, p in loaded.module.named_parameters()})
    return replace(loaded, module=made)


def refuse_tangent(loaded: Any) -> None:
    """Raise SourceError for a linearised model, whose layers see two values each."""
    if isinstance(loaded.module, Linearized):
        raise SourceError(
            f"{loaded.label}: a linearised model; statistics are of ordinary ones, as the one that it starts from"
        )
