"""What a plug-in imports: the base classes of methods, filters and codecs, and the fields of their parameters."""

from __future__ import annotations

from weightsmith.core.method import (
    BASE,
    Codec,
    Filter,
    Grain,
    Method,
    Pipeline,
    Rows,
    Scope,
    Stage,
    Traits,
    registered,
    registry,
)
from weightsmith.core.parameter import Each, Parameter, choice, flag, integer, number
from weightsmith.core.pass_ import Found, Pass, State
from weightsmith.core.site import Group, Site

__all__ = ["BASE", "Codec", "Each", "Filter", "Found", "Grain", "Group", "Method", "Parameter", "Pass", "Pipeline",
           "Rows", "Scope", "Site", "Stage", "State", "Traits", "choice", "flag", "integer", "number", "registered",
           "registry"]  # fmt: skip
