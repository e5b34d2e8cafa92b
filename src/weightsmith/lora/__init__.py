"""Adapters as adapters: combine them, average a run's, make them smaller, and get them out of fine-tuned models.

    from weightsmith import lora

    lora.merge({"math": "adapters/math", "code": "adapters/code"}, "svd", "both", rank=16)
    lora.extract("models/math", "models/base", "math-lora", energy=0.9)

The result is a PEFT folder, which `peft.PeftModel.from_pretrained` loads.
"""

from __future__ import annotations

from weightsmith.lora.average import average
from weightsmith.lora.extract import extract
from weightsmith.lora.merge import merge, run
from weightsmith.lora.recipe import load
from weightsmith.lora.resize import resize
from weightsmith.lora.write import ModuleReport, Written

__all__ = ["ModuleReport", "Written", "average", "extract", "load", "merge", "resize", "run"]
