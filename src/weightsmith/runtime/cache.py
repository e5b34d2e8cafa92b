"""Caches for transformers whose layers share what they hold: xKV (low rank), and its baseline MiniCache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import MissingExtra, PlanError
from weightsmith.runtime.binding import ATTENTION, bind
from weightsmith.runtime.group import Group, Policy, Turns
from weightsmith.runtime.reading import MANY, Reading
from weightsmith.runtime.shared import Rule

try:
    from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
except ModuleNotFoundError:
    raise MissingExtra("transformers", "models", "a compressed cache") from None

__all__ = ["MiniCache", "XkvCache"]

if TYPE_CHECKING:
    Cache = CacheLayerMixin = object


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's view of its group, as transformers asks for it."""

    is_sliding = False
    is_croppable = False

    def __init__(self, cache: XkvCache, group: Group, place: int) -> None:
        super().__init__()
        self._cache, self._group, self._place = cache, group, place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new states; all states, or the exact ones with a note of where the attention reads the rest."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._cache._take(self._group, self._place, key_states, value_states)

    def get_seq_length(self) -> int:
        return self._group.length(self._place)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self._group.clear()

    def crop(self, tokens_to_remove: int) -> None:
        raise PlanError([f"{type(self._cache).__name__} cannot take tokens back, which assisted decoding asks for"])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._choose(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose(torch.arange(self._group.batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        places = torch.arange(self._group.batch, device=self.device)
        self._choose(places[indices.to(self.device)])

    def offload(self) -> None:
        raise PlanError([f"{type(self._cache).__name__} does not move between devices"])

    def _choose(self, index: Tensor) -> None:
        # Each layer is asked; the group moves once, with its first.
        if self._place == 0 and self.get_seq_length():
            self._group.take(index.to(self.device))
            self._cache._follow(self._group, index.to(self.device))


class XkvCache(Cache):  # type: ignore[misc]
    """A cache in which neighbouring layers share one low-rank basis (xKV, Chang et al., arXiv:2503.18893).

        cache = XkvCache(model, group=4, rank_k=256, rank_v=384)
        model.generate(**inputs, past_key_values=cache)

    Of each group of G layers it holds P [tokens, r] and per layer E [r, D], r (L + G D) numbers in place of L G D, for
    keys before their rotation and for values; and exactly the first `sink` and the last tokens.  A prompt's own
    attention is exact; one group at a time is held exactly.  Each sequence of a batch has its own basis.

    model         the transformers model that runs; hooks are put on it, and its attention reads the cache in tiles
    group         layers of a group; `groups` says which layers instead, others stay exact
    rank_k, rank_v  r of a group's keys and values; or `energy`: the fewest that hold this share of the squared singular
                  values (default 0.995 where no rank is given).  A latent cache (MLA: DeepSeek-V2, V3) compresses the
                  latents by rank_k; its rotary key stays exact unless rank_v is given
    recent, sink  last and first tokens that stay exact
    least         fewer tokens stay exact; so do groups in which the factors would take as much
    every         new tokens after which the tail is compressed again; None: never, as in the paper
    always        compress also where that saves nothing
    tiles         False: rebuild all keys and values of a layer in every step, for models with an attention of their own

    Raises PlanError, with all problems, for models with sliding windows or linear attention, cross-attention, and
    caches chosen in the configuration.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        group: int = 4,
        groups: Sequence[Sequence[int]] | None = None,
        rank_k: int | None = None,
        rank_v: int | None = None,
        energy: float | None = None,
        recent: int = 0,
        sink: int = 0,
        least: int = 64,
        every: int | None = 512,
        always: bool = False,
        tiles: bool = True,
    ) -> None:
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        latent = getattr(config, "kv_lora_rank", None) is not None
        if energy is None and rank_k is None and rank_v is None:
            energy = 0.995
        keys = Rule(rank_k, None if rank_k else energy, always)
        values = Rule(rank_v, None if rank_v or latent else energy, always)
        chosen = _groups(config, group, groups)
        limits = {"group": group, "least": least, "energy": energy, "rank_k": rank_k, "rank_v": rank_v}
        problems = [*_unfit(model), *_values(limits, recent, sink, every), *_misplaced(chosen, config)]
        if not always:
            problems += _too_large(config, chosen, rank_k, rank_v, latent)
        if problems:
            raise PlanError(problems)
        waits = every if every is not None else 1 << 62
        self._set_up(model, chosen, Policy(keys, values, recent, sink, least, waits), tiles)

    def _set_up(self, model: nn.Module, groups: Sequence[Sequence[int]], policy: Policy, tiles: bool) -> None:
        self._binding = bind(model, tiles)
        self._config: Any = model.config
        self._tiles = tiles and self._binding.tiles
        self._turns = Turns()
        self.groups = [Group(layers, policy, self._turns, self._binding.rotate) for layers in groups]
        count = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
        layers: list[Any] = [DynamicLayer() for _ in range(count)]
        for one in self.groups:
            for place, number in enumerate(one.layers):
                layers[number] = _Layer(self, one, place)
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of factors, of exact states, and of the cosines and sines with which keys are rotated."""
        found = {"factors": 0, "exact": 0, "rotations": self._turns.nbytes}
        for one in self.groups:
            for kind, size in one.nbytes.items():
                found[kind] += size
        plain = [layer for layer in self.layers if not isinstance(layer, _Layer) and layer.is_initialized]
        found["exact"] += sum(layer.keys.nbytes + layer.values.nbytes for layer in plain)
        return found

    @property
    def exact_nbytes(self) -> int:
        """Bytes that an exact cache would hold of the same tokens."""
        plain = [layer for layer in self.layers if not isinstance(layer, _Layer) and layer.is_initialized]
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain)
        return int(kept + sum(one.exact_nbytes for one in self.groups))

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._turns.clear()

    def _take(self, group: Group, place: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        binding = self._binding
        binding.check()
        if self._turns.tokens < group.length(place) + keys.shape[2] and binding.rotate is not None:
            if binding.turn is None:
                raise PlanError(["the model that runs is not the one that this cache was made for"])
            self._turns.add(*binding.turn)
        mask = binding.mask
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise PlanError(["this cache needs an attention_mask of [batch, tokens], which says where padding is"])
        found = group.add(place, keys, values, mask)
        if not isinstance(found, Reading):
            return found
        reads = self._tiles and self._config._attn_implementation == ATTENTION and keys.shape[2] < MANY
        if not reads:
            return found.whole()
        exact_keys, exact_values = found.last
        return binding.hand_over(exact_keys, found), exact_values

    def _follow(self, group: Group, index: Tensor) -> None:
        if group is self.groups[0]:
            self._turns.take(index)


class MiniCache(XkvCache):
    """The baseline: pairs of layers share a direction per token, half way on the sphere, and keep their norms.

    MiniCache (Liu et al., arXiv:2405.14366) in the form of xKV's public code: per head, t = 0.5, and tokens whose angle
    is within the lowest 5% of the range stay exact.  Keys are joined before their rotation.  pairs: the first layer of
    each pair; default: all layers, two by two.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pairs: Sequence[int] | None = None,
        recent: int = 0,
        least: int = 64,
        every: int | None = 512,
        tiles: bool = True,
    ) -> None:
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        starts = range(0, config.num_hidden_layers - 1, 2) if pairs is None else pairs
        groups = [(first, first + 1) for first in starts]
        problems = [*_unfit(model), *_values({"least": least}, recent, 0, every), *_misplaced(groups, config)]
        if getattr(config, "kv_lora_rank", None) is not None:
            problems.append("MiniCache joins keys and values of heads; a latent cache has none")
        if problems:
            raise PlanError(problems)
        waits, rule = (every if every is not None else 1 << 62), Rule(rank=1)
        self._set_up(model, groups, Policy(rule, rule, recent, 0, least, waits, slerp=True), tiles)


# --- what does not fit -----------------------------------------------------------------------------


def _groups(config: Any, size: int, given: Sequence[Sequence[int]] | None) -> list[tuple[int, ...]]:
    if given is not None:
        return [tuple(layers) for layers in given]
    count = config.num_hidden_layers
    return [tuple(range(low, min(low + size, count))) for low in range(0, count, max(size, 1))]


def _unfit(model: nn.Module) -> list[str]:
    """What about the model cannot be held."""
    config: Any = model.config
    text, name, found = config.get_text_config(), type(model).__name__, []
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        found.append(f"{name}: its layers are partly {', '.join(kinds)}; only full attention can be compressed")
    elif getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        found.append(f"{name}: it has a sliding window of {text.sliding_window} tokens, which already bounds its cache")
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "add_cross_attention", False):
        found.append(f"{name}: it has cross-attention, whose states do not grow; this cache is for decoders")
    chosen = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    if chosen is not None:
        found.append(f"{name}: generation_config.cache_implementation = {chosen!r} is another cache; set it to None")
    if getattr(config, "output_attentions", False) or getattr(text, "output_attentions", False):
        found.append(f"{name}: output_attentions asks for weights that are never whole; set it to False")
    softcap = getattr(text, "attn_logit_softcapping", None)
    if softcap is not None:
        found.append(f"{name}: attn_logit_softcapping = {softcap} is not supported")
    return found


def _values(limits: dict[str, Any], recent: int, sink: int, every: int | None) -> list[str]:
    found = [f"{name} must be at least 1, got {value}" for name, value in limits.items()
             if name != "energy" and value is not None and value < 1]  # fmt: skip
    if (energy := limits.get("energy")) is not None and not 0 < energy <= 1:
        found.append(f"energy must be above 0 and at most 1, got {energy}")
    found += [
        f"{name} must not be negative, got {value}" for name, value in (("recent", recent), ("sink", sink)) if value < 0
    ]
    if every is not None and every < 1:
        found.append(f"every must be at least 1, or None, got {every}")
    return found


def _misplaced(groups: Sequence[Sequence[int]], config: Any) -> list[str]:
    count, seen, found = config.num_hidden_layers, set[int](), []
    for layers in groups:
        for layer in layers:
            if not 0 <= layer < count:
                found.append(f"layer {layer} of a group is not one of the model's 0 .. {count - 1}")
            if layer in seen:
                found.append(f"layer {layer} is in two groups")
            seen.add(layer)
        if list(layers) != sorted(layers):
            found.append(f"group {list(layers)}: layers run in rising order")
    return found


def _too_large(
    config: Any, groups: Sequence[Sequence[int]], rank_k: int | None, rank_v: int | None, latent: bool
) -> list[str]:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sides = (config.kv_lora_rank, config.qk_rope_head_dim) if latent else (heads * width, heads * width)
    # A shorter last group may stay exact; if the largest does, nothing is compressed.
    most = max(map(len, groups), default=0)
    return [
        f"{name} = {rank} is no compression of {most} layers of {side} numbers per token; take less than {most * side}"
        for name, rank, side in (("rank_k", rank_k, sides[0]), ("rank_v", rank_v, sides[1]))
        if most and rank is not None and rank >= most * side
    ]
