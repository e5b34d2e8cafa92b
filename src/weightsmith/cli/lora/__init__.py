"""`weightsmith lora`: adapters as adapters."""

from __future__ import annotations

from weightsmith.cli.lora.average import average
from weightsmith.cli.lora.experts import experts
from weightsmith.cli.lora.extract import extract
from weightsmith.cli.lora.merge import merge
from weightsmith.cli.lora.resize import resize
from weightsmith.cli.words import Verbs

__all__ = ["lora"]

lora = Verbs(
    "Combine LoRA adapters, average a run's, make them smaller, or get them out of models.",
    (merge, extract, average, resize, experts),
)
