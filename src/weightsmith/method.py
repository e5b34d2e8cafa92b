"""What a plug-in imports: the base classes of methods, filters and codecs, and the fields of their parameters."""

from __future__ import annotations

from weightsmith.core.checks import (
    Case,
    Check,
    Verdict,
    at_least,
    at_most,
    by_depth,
    dims,
    exactly,
    leave,
    refuse,
    remark,
    remark_here,
    small_changes,
    with_base,
)
from weightsmith.core.costs import Costs
from weightsmith.core.method import (
    BASE,
    Codec,
    Factored,
    Filter,
    Grain,
    GroupMethod,
    MergedFilter,
    Method,
    Pipeline,
    Rows,
    Scope,
    Stage,
    StandaloneCodec,
    Traits,
    Whole,
    registered,
    registry,
)
from weightsmith.core.parameter import Each, Parameter, choice, flag, integer, number
from weightsmith.core.pass_ import Found, Pass, State
from weightsmith.core.site import Group, Site

__all__ = ["BASE", "Case", "Check", "Codec", "Costs", "Each", "Factored", "Filter", "Found", "Grain", "Group",
           "GroupMethod", "MergedFilter", "Method", "Parameter", "Pass", "Pipeline", "Rows", "Scope", "Site", "Stage",
           "StandaloneCodec", "State", "Traits", "Verdict", "Whole", "at_least", "at_most", "by_depth", "choice",
           "dims", "exactly", "flag", "integer", "leave", "number", "refuse", "registered", "registry", "remark",
           "remark_here", "small_changes", "with_base"]  # fmt: skip
