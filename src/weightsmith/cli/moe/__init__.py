"""`weightsmith moe`: mixtures of experts."""

from __future__ import annotations

from weightsmith.cli.moe.build import build
from weightsmith.cli.moe.calibrate import calibrate
from weightsmith.cli.moe.shrink import shrink
from weightsmith.cli.words import Verbs

__all__ = ["moe"]

moe = Verbs("Build a mixture of experts of dense models, or make one smaller.", (build, shrink, calibrate), build)
