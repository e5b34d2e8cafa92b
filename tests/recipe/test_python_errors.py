"""Words of a call from Python that mean nothing: one line each, as of a recipe."""

from __future__ import annotations

from typing import Any

import pytest

import weightsmith as ws
from kit import noise
from weightsmith.core.errors import RecipeError

MODELS = {"a": {"w": noise(3, 3)}, "b": {"w": noise(3, 3, seed=1)}}


@pytest.mark.parametrize(
    ("models", "options", "text"),
    [
        (MODELS, {"dtype": "bf16"}, r"^dtype: unknown dtype 'bf16'; did you mean 'bfloat16'\?$"),
        (MODELS, {"rules": [{"match": "*", "methd": "keep"}]}, r"^[^\n]*methd[^\n]*$"),
        (MODELS, {"progress": True}, r"^progress: expected a function of \(done, total\), got True$"),
        (MODELS, {"threads": "2"}, r"^threads: expected a whole number, got '2'$"),
        ("models/a", {}, r"^expected a list of models, or a dict by name, got 'models/a'; write"),
    ],
)
def test_wrong_words(models: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        ws.merge(models, "average", **options)
