"""Golden cases of vocabularies: embeddings in a common vocabulary, and orthogonal matching pursuit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from goldens import tiny_llama
from weightsmith.io.read.source import MemorySource
from weightsmith.ops.pursuit import omp
from weightsmith.tokens.layout import lay_out, read_rule
from weightsmith.tokens.view import RenumberedSource

NAME = "model.embed_tokens.weight"


def embeddings(seed: int, params: dict[str, Any]) -> dict[str, Tensor]:
    vocabularies = {str(i): found for i, found in enumerate(params["vocabs"])}
    names = tuple(vocabularies)
    made = tiny_llama.make(seed, len(names))[1]
    sources = {
        name: MemorySource({NAME: torch.from_numpy(made[i][NAME][: len(vocabularies[name])])})
        for i, name in enumerate(names)
    }
    rules = {token: read_rule(token, _named(given), names) for token, given in (params.get("tokens") or {}).items()}
    layout = lay_out(
        vocabularies,
        {name: len(found) for name, found in vocabularies.items()},
        params["output_vocab"],
        base=None if params.get("base") is None else str(params["base"]),
        rules={token: rule for token, rule in rules.items() if rule is not None},
        multiple=params.get("pad_to_multiple_of"),
    )
    return {f"embed.{n}": RenumberedSource(s, n, sources, layout, [NAME]).read(NAME) for n, s in sources.items()}


def _named(given: dict[str, Any]) -> dict[str, Any]:
    """The cases number the models."""
    source = given.get("source")
    if isinstance(source, int):
        return {**given, "source": str(source)}
    if isinstance(source, dict) and "model" in source:
        return {**given, "source": {**source, "model": str(source["model"])}}
    return given


def pursuit(given: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    inputs = {name: tensor for name, tensor in given.items() if name.startswith("omp.input.")}
    indices, coefficients = omp(inputs["omp.input.targets"], inputs["omp.input.donor_shared"], k)
    coefficients = coefficients.float()
    result = (coefficients.unsqueeze(1) @ inputs["omp.input.base_shared"][indices]).squeeze(1)
    return {**inputs, "omp.indices": indices, "omp.coeff": coefficients, "omp.result": result}
