"""What mergekit's own examples and documentation show: its examples/ as they are and as they once were, and the configs
of its README and of its pages on merges in several stages, on tokenizers and on models of several parts.

The shapes and parameters are theirs, written anew for these models: SEE0, SEE1 see (Qwen2-VL), HEAR0, HEAR1 hear
(Whisper), SAY0, SAY1 and SAY2 have tokenizers of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.compare.grid import EQUALS, NOISE, Config, cut, models, stack, weighted

__all__ = ["examples"]

_GRADIENTS = (
    "parameters:\n  t:\n    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}\n"
    "    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}\n    - value: 0.5"
)


def examples() -> Iterator[Config]:
    yield from _whole()
    yield from _stages()
    yield from _parts()
    yield from _tokenizers()


def _whole() -> Iterator[Config]:
    """Files of examples/ that merge whole models or stack layers."""
    both = f"{stack(cut('BASE', 0, 4) + ', ' + cut('A', 0, 4))}\nmerge_method: slerp\nbase_model: BASE\n{_GRADIENTS}"
    yield Config("example: gradient-slerp", f"{both}\ndtype: float16")
    listed = f"{models('model: BASE', 'model: A')}\nmerge_method: slerp\nbase_model: BASE\n{_GRADIENTS}"
    yield Config("example: gradient-slerp, models listed", f"{listed}\ndtype: float16")
    yield Config("example: linear", f"{weighted(1.0, 0.3, 0.5)}\nmerge_method: linear\ndtype: float16")
    for dtype, unlike in (("float16", EQUALS), ("float32", (0.0, ""))):
        yield Config(
            f"example: ties, {dtype}",
            "models:\n"
            "  - model: A\n    parameters: {density: [1, 0.7, 0.1], weight: 1.0}\n"
            "  - model: B\n    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}\n"
            "  - model: C\n    parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}\n"
            "merge_method: ties\nbase_model: BASE\nparameters: {normalize: true, int8_mask: true}\n"
            f"dtype: {dtype}",
            unlike=unlike,
        )
        halves = models(*(f"model: {m}, parameters: {{density: 0.5, weight: 0.5}}" for m in "AB"))
        yield Config(
            f"example: bio-merge, {dtype}",
            f"{halves}\nmerge_method: ties\nbase_model: BASE\nparameters: {{normalize: false, int8_mask: true}}\n"
            f"dtype: {dtype}",
            unlike=unlike,
        )
    yield Config(
        "example: arcee_fusion",
        f"{models('model: BASE', 'model: A')}\nmerge_method: arcee_fusion\nbase_model: BASE\ndtype: bfloat16",
        unlike=NOISE,
        stores="F32",
    )
    yield Config(
        "example: orcamini-platy-44layer (stacked with overlap)",
        f"{stack(cut('A', 0, 3), cut('B', 1, 4))}\nmerge_method: passthrough\ndtype: float16",
    )
    yield Config(
        "example: gpt2-small (the first layers)",
        f"{stack(cut('A', 0, 3))}\nmerge_method: passthrough\ndtype: float16",
    )
    yield Config(
        "example: self-attention from one, mlp from another",
        "models:\n  - {model: A, parameters: {weight: [{filter: self_attn, value: 1}, {value: 0.0001}]}}\n"
        "  - {model: B, parameters: {weight: [{filter: mlp, value: 1}, {value: 0.0001}]}}\n"
        "merge_method: linear\ndtype: float32",
    )
    yield Config(
        "example: model stock",
        f"{models('model: A', 'model: B', 'model: C')}\nmerge_method: model_stock\nbase_model: BASE\ndtype: bfloat16",
    )
    yield Config(
        "example: dare_ties",
        "models:\n  - {model: BASE}\n  - {model: A, parameters: {density: 0.53, weight: 0.4}}\n"
        "  - {model: B, parameters: {density: 0.53, weight: 0.3}}\n"
        "merge_method: dare_ties\nbase_model: BASE\nparameters: {int8_mask: true}",
        random=True,
    )


def _stages() -> Iterator[Config]:
    """Merges that use one another by name."""
    first = f"name: first\n{stack(cut('BASE', 0, 4) + ', ' + cut('A', 0, 4))}\nmerge_method: slerp\nbase_model: BASE\n"
    for dtype, unlike in (("float16", (0.03, "the stage between is rounded to float16 there, here it is not")),
                          ("float32", (0.0, ""))):  # fmt: skip
        yield Config(
            f"example: mega (slerp, then ties), {dtype}",
            f"{first}{_GRADIENTS}\ndtype: {dtype}\n---\nname: second\nmodels:\n"
            "  - {model: first, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}\n"
            "  - {model: C, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}\n"
            "merge_method: ties\nbase_model: BASE\nparameters: {normalize: true, int8_mask: true}\n"
            f"dtype: {dtype}",
            unlike=unlike,
        )
    begin = (
        f"name: first\n{models('model: BASE', 'model: A')}\nmerge_method: linear\nparameters: {{weight: 0.5}}\n---\n"
        f"name: second\n{models('model: B')}\nmerge_method: slerp\nbase_model: first\nparameters: {{t: 0.5}}\n---\n"
    )
    for densities in ((0.6, 0.8), (1.0, 1.0)):
        weights = zip(("second", "C"), densities, strict=True)
        third = models(*(f"model: {m}, parameters: {{density: {d}, weight: 0.5}}" for m, d in weights))
        yield Config(
            f"multimerge: linear, slerp, dare_ties, densities {densities[0]} and {densities[1]}",
            f"{begin}{third}\nmerge_method: dare_ties\nbase_model: BASE",
            random=densities[0] < 1,
        )


def _parts() -> Iterator[Config]:
    """Models that see or hear, as one and part by part."""
    see = "models:\n  - {model: SEE0, parameters: {weight: 1.0}}\n  - {model: SEE1, parameters: {weight: 1.0}}\n"
    yield Config("example: vlm-linear", f"{see}merge_method: linear\ndtype: float32")
    yield Config(
        "example: vlm-ties",
        "models:\n  - {model: SEE1, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}\n"
        "  - {model: SEE2, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}\n"
        "merge_method: ties\nbase_model: SEE0\nparameters: {normalize: true, int8_mask: true}\ndtype: float32",
    )

    def both(kind: str, first: float, second: float) -> str:
        weights = ((f"{kind}0", first), (f"{kind}1", second))
        return "models: [" + ", ".join(f"{{model: {m}, parameters: {{weight: {w}}}}}" for m, w in weights) + "]"

    parts = {"text_decoder": (0.7, 0.3), "multi_modal_projector": (0.5, 0.5), "vision_tower": (1, 0)}
    listed = "".join(f"  {name}: {{{both('SEE', *w)}}}\n" for name, w in parts.items())
    yield Config("modules of a model that sees", f"modules:\n{listed}merge_method: linear\ndtype: float32")
    yield Config(
        "example: whisper-merge-multilingual", f"{models('model: HEAR1')}\nmerge_method: slerp\nbase_model: HEAR0\n"
        "parameters: {t: 0.3}",
    )  # fmt: skip
    parts = {"encoder": (0.8, 0.2), "decoder": (0.3, 0.7)}
    listed = "".join(f"  {name}: {{{both('HEAR', *w)}}}\n" for name, w in parts.items())
    yield Config("example: whisper-encoder-decoder-weighted", f"modules:\n{listed}merge_method: linear")


def _tokenizers() -> Iterator[Config]:
    """The README's tokenizer blocks."""
    task = (
        "models:\n  - {model: SAY1, parameters: {weight: 0.6}}\n  - {model: SAY2, parameters: {weight: 0.5}}\n"
        "merge_method: task_arithmetic\nbase_model: SAY0\ndtype: float32\n"
    )
    yield Config("tokenizer_source: union", f"{task}tokenizer_source: union")
    yield Config("tokenizer_source: base", f"{task}tokenizer_source: base")
    yield Config("tokenizer_source: a model", f"{task}tokenizer_source: SAY1")
    yield Config(
        "tokenizer: base, padded", f"{task}tokenizer: {{source: base, pad_to_multiple_of: 16}}",
    )  # fmt: skip
    yield Config(
        "tokenizer: union, both prompt formats",
        f"{task}tokenizer:\n  source: union\n  tokens:\n"
        "    <|im_start|>: {source: SAY1}\n    <|im_end|>: {source: SAY1}\n"
        "    <|eot_id|>: {source: SAY2, force: true}\n",
    )
    yield Config(
        "tokenizer: a token under another name, a new one",
        f"{task}tokenizer:\n  source: union\n  tokens:\n"
        "    <|renamed|>: {source: {kind: model_token, model: SAY1, token: <|im_end|>}}\n"
        "    <|again|>: {source: {kind: model_token, model: SAY2, token_id: 4}}\n",
    )
    yield Config(
        "tokenizer: zeros for a token",
        f"{task}tokenizer:\n  source: base\n  tokens:\n    <|unused|>: {{source: {{kind: zero}}}}\n",
    )
