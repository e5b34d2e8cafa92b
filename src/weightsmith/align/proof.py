"""The proof of a layout: random permutations of a small model of the same architecture leave its outputs as they are.

Roles and shapes are a guess.  So transformers builds the model's class from its config.json with narrower layers and
as few blocks as show every kind of tensor, all numbers random; the same `layout` is found in its files, permuted at
random, and both models run in float64.  A group whose permutation changes any output is frozen, wherever its kind
stands in the full model, and says by how much.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from weightsmith.align.layout import Layout, layout
from weightsmith.core.errors import MissingExtra, SourceError
from weightsmith.core.keys import layer_of
from weightsmith.core.symmetry import SymmetryGroup, identity, permute
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.folder import FolderSource
from weightsmith.io.read.layers import config_of, cut_config
from weightsmith.io.read.shell import no_bars, quiet
from weightsmith.io.read.small import parse_json
from weightsmith.io.read.source import Source
from weightsmith.io.read.views import block_counts

__all__ = ["TOLERANCE", "SmallModel", "drawn", "kind_of", "pattern", "proved", "random_numbers", "refuted",
           "small_config", "small_model"]  # fmt: skip

TOLERANCE = 1e-8
"""Largest change of an output, in float64, relative to the largest output (or to 1)."""

_HEAD = 8  # entries of a head in the small model
_TOKENS = 12
_VOCABULARY = 91
_WIDTHS = re.compile(
    r"(hidden_size|n_embd|d_model|dim|n_inner|d_ff|d_kv|head_dim|rotary_dim|word_embed_proj_dim|hidden_dim"
    r"|(\w+_)?(intermediate_size|ffn_dim|head_dim))"
)
"""Fields of config.json that count entries of a layer; all are divided by the same number."""
_LARGEST = 60_000_000  # parameters of a model that is built for a proof


def proved(source: Source) -> Layout:
    """The layout of a model with every group proved that is left in it; others are frozen, with the reason.

    Raises SourceError where no model can be built to prove it on, MissingExtra without transformers.
    """
    full = layout(source)
    with small_model(source) as small:
        broken, seen = _tried(small)
    groups = []
    frozen = dict(full.frozen)
    for group in full.groups:
        kind = kind_of(group, small.prefix)
        if kind in broken:
            frozen[group.name] = broken[kind]
        elif kind not in seen:
            frozen[group.name] = "no block like it is in the small model that proves the others"
        else:
            groups.append(group)
    return Layout(tuple(groups), frozen)


@contextmanager
def small_model(source: Source) -> Iterator[SmallModel]:
    """A small model of a model's architecture, in float64; SourceError where none can be built."""
    text = config_of(source)
    if text is None:
        raise SourceError(f"{source}: no config.json, so nothing proves that a permutation keeps what it computes")
    with tempfile.TemporaryDirectory(prefix="weightsmith-proof-") as name, _doubles():
        yield SmallModel(small_config(source, text), Path(name), str(source))


def _tried(small: SmallModel) -> tuple[dict[str, str], set[str]]:
    """Kinds of groups that change an output, with the reason, and all kinds there are."""
    groups = layout(small.source).groups
    refused = refuted(groups, small.change)
    broken = {kind_of(group, small.prefix): refused[group.name] for group in groups if group.name in refused}
    return broken, {kind_of(group, small.prefix) for group in groups}


def refuted(groups: Sequence[SymmetryGroup], change: Callable[[Sequence[SymmetryGroup]], float]) -> dict[str, str]:
    """The groups whose permutations change an output, by name, and why; change: of permuting some at random."""
    if not groups or change(groups) <= TOLERANCE:
        return {}
    said = "a permutation changes the outputs (by {:.1g} of the largest)"
    found = {g.name: said.format(by) for g in groups if (by := change([g])) > TOLERANCE}
    left = [group for group in groups if group.name not in found]
    if left and (by := change(left)) > TOLERANCE:
        return found | {group.name: f"{said.format(by)} together with others" for group in left}
    return found


def kind_of(group: SymmetryGroup, prefix: str) -> str:
    """What groups of different blocks have in common: names without numbers, also of all that they hold.

    prefix: of the class's names in memory, which older files may lack.
    """
    inside = [small.name for small in group.inside]
    names = sorted({pattern(name.removeprefix(prefix)) for name in group.names})
    return " ".join((pattern(group.name.removeprefix(prefix)), *inside, *names))


def pattern(name: str) -> str:
    """A name without its numbers: what tensors of all blocks have in common."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


# --- the small model -------------------------------------------------------------------------------


def small_config(source: Source, text: str) -> dict[str, Any]:
    """config.json of a narrow model with as few blocks as show every kind of tensor."""
    counts = block_counts(source)
    cuts = {stack: (count, 0, min(count, _shown(source, stack, count))) for stack, count in counts.items()}
    cuts = {stack: cut for stack, cut in cuts.items() if cut[2] < cut[0]}
    label = f"{source}: config.json"
    with suppress(SourceError):  # of blocks that it does not count there are as many as before
        text = cut_config(text, cuts, label) if cuts else text
    config = parse_json(text.encode(), label)
    for scope in (config, *(v for v in config.values() if isinstance(v, dict))):
        _narrow(scope)
    found: dict[str, Any] = config
    return found


def _shown(source: Source, stack: str, count: int) -> int:
    """How many blocks show every kind of tensor of a stack; at least two."""
    kinds: dict[str, int] = {}
    for name in source.keys:
        if (place := layer_of(name)) is not None and place[0] == stack:
            kind = pattern(name)
            kinds[kind] = min(kinds.get(kind, count), place[1])
    return max(2, 1 + max(kinds.values(), default=0))


def _narrow(scope: dict[str, Any]) -> None:
    """Divide the widths of a configuration so that heads have 8 entries, and take a small vocabulary."""
    heads = next((scope[n] for n in ("num_attention_heads", "n_head", "num_heads") if isinstance(scope.get(n), int)), 0)
    width = next((scope[n] for n in ("hidden_size", "n_embd", "d_model") if isinstance(scope.get(n), int)), 0)
    head = scope.get("head_dim") or scope.get("d_kv") or (width // heads if heads else 0)
    small = next((n for n in (_HEAD, 2 * _HEAD, 4 * _HEAD) if _in_pairs(scope, n)), head)
    factor = head // small if isinstance(head, int) and head and head % small == 0 else 1
    widths = [n for n, v in scope.items() if _WIDTHS.fullmatch(n) and isinstance(v, int) and not isinstance(v, bool)]
    if factor > 1 and all(scope[name] % factor == 0 for name in widths):
        scope.update({name: scope[name] // factor for name in widths})
    if isinstance(scope.get("vocab_size"), int):
        scope["vocab_size"] = min(scope["vocab_size"], _VOCABULARY)
        for name in [n for n in scope if n.endswith("token_id") and scope[n] is not None]:
            scope[name] = 0 if name.startswith("pad") else 1


def _in_pairs(scope: Mapping[str, Any], head: int) -> bool:
    """Whether the share of a head that rotary position embeddings turn is made of pairs."""
    scopes = (scope, *(v for v in scope.values() if isinstance(v, dict)))
    words = ("partial_rotary_factor", "rotary_pct")
    share = next((one[n] for one in scopes for n in words if isinstance(one.get(n), float)), 1.0)
    return int(share * head) % 2 == 0 < int(share * head) and abs(share * head - int(share * head)) < 1e-6


class SmallModel:
    """A small model in a folder, which is read anew after each permutation of its tensors."""

    def __init__(self, config: dict[str, Any], folder: Path, label: str) -> None:
        self.folder, self.label = folder, label
        with self._explained():
            model = _built(config)
            model.save_pretrained(folder)
        self.source = packed_like_memory(FolderSource(folder))
        self.tensors = {
            name: random_numbers(name, key.shape, i) for i, (name, key) in enumerate(self.source.keys.items())
        }
        self.model_class = type(model)
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.expected = self._outputs(self.tensors)

    def change(self, groups: Sequence[SymmetryGroup]) -> float:
        """Largest change of an output by random permutations of some groups, relative to the largest output."""
        draw = np.random.default_rng(len(groups))
        tensors = self.tensors
        for group in groups:
            tensors = {**tensors, **permute(tensors, group, drawn(group, draw))}
        return self.differs(tensors)

    def differs(self, tensors: Mapping[str, Tensor]) -> float:
        """Largest change of an output where the model has these tensors, relative to the largest output."""
        found = self._outputs(tensors)
        if not bool(torch.isfinite(found).all()):
            return float("inf")
        return float((found - self.expected).abs().max()) / max(1.0, float(self.expected.abs().max()))

    def _outputs(self, tensors: Mapping[str, Tensor]) -> Tensor:
        for file in self.folder.glob("*.safetensors*"):
            file.unlink()
        save_file({n: t.contiguous() for n, t in tensors.items()}, self.folder / "model.safetensors", {"format": "pt"})
        with self._explained():
            model = self.model_class.from_pretrained(self.folder, dtype=torch.float64, local_files_only=True)
            if hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")  # the faster ones take no float64
            with torch.no_grad():
                return _run(model.eval())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever a library says against it is why there is no proof."""
        try:
            import transformers
        except ModuleNotFoundError:
            raise MissingExtra("transformers", "models", "proving a permutation") from None
        try:
            with quiet(transformers), no_bars():
                yield
        except Exception as error:
            if isinstance(error, SourceError):
                raise
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise SourceError(f"{self.label}: no small model can be built to prove permutations on: {said}") from error


def _built(config: dict[str, Any]) -> Any:
    import transformers

    names = config.get("architectures") or []
    kind = config.get("model_type")
    cls = getattr(transformers, str(names[0]), None) if names else None
    if cls is None or kind not in transformers.CONFIG_MAPPING:
        raise SourceError(f"transformers knows no {names[0] if names else 'architecture'} of the type {kind!r}")
    made = transformers.CONFIG_MAPPING[kind].from_dict(config)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(made).parameters())
    if size > _LARGEST:
        raise SourceError(f"{json.dumps(kind)}: the smallest model of its kind still has {size:,} parameters")
    return cls(made)


def random_numbers(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random numbers of a size that keeps a network alive; no norm or bias is at the neutral value of a fresh model."""
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=draw, dtype=torch.float64)
    if len(shape) < 2:
        return 0.3 * numbers if name.endswith(("bias", "mean")) else 1 + 0.3 * numbers
    return numbers / math.sqrt(shape[-1])


def drawn(group: SymmetryGroup, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Random orders of a group and those inside it, none of which leaves everything where it is."""
    found = {}
    for name, same in identity(group).items():
        order = draw.permuted(same, axis=-1)
        still = (order == same).all(axis=-1, keepdims=True)
        found[name] = np.where(still, np.roll(same, 1, axis=-1), order)
    return found


def _run(model: Any) -> Tensor:
    """The outputs of a model for random inputs: [whatever], float64."""
    draw = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        shape = (2, getattr(config, "num_channels", 3), size, size)
        out = model(pixel_values=torch.randn(shape, generator=draw, dtype=torch.float64))
    elif hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):  # both towers of CLIP
        size = config.vision_config.image_size
        pixels = torch.randn((2, 3, size, size), generator=draw, dtype=torch.float64)
        ids = torch.randint(2, config.get_text_config().vocab_size, (2, _TOKENS), generator=draw)
        found = model(input_ids=ids, pixel_values=pixels)
        return torch.cat([found.text_embeds, found.image_embeds])
    else:
        ids = torch.randint(2, config.get_text_config().vocab_size, (2, _TOKENS), generator=draw)
        decoder = {"decoder_input_ids": ids.flip(1)} if getattr(config, "is_encoder_decoder", False) else {}
        out = model(input_ids=ids, **decoder)
    logits = getattr(out, "logits", None)
    given: Tensor = out[0] if logits is None else logits
    return given


# --- float64 all the way ---------------------------------------------------------------------------


class _Doubles(TorchFunctionMode):
    """Keeps float64 where a model asks for float32 in between, as norms and softmaxes do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        swapped = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*swapped, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


@contextmanager
def _doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(before)
