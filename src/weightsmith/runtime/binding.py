"""What a cache must know of a running model: masks and rotations of a forward pass, and an attention that reads it.

`bind` puts hooks on a model's decoder and, where the model asks for its attention by name, an attention function that
reads compressed states tile by tile.  With any other cache, or none, the model runs as before.  `release` undoes it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from weightsmith.core.errors import MissingExtra, PlanError
from weightsmith.runtime.reading import Reading, attend

__all__ = ["ATTENTION", "Binding", "Rotate", "bind", "release"]

ATTENTION = "weightsmith_xkv"
"""Under which name transformers knows the attention function."""

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(states [batch, heads, tokens, width], cos, sin [batch or 1, tokens, rotated width]) -> rotated states."""

_READING = "weightsmith_reading"  # attribute of the keys that `update` hands to the attention
_BOUND: WeakKeyDictionary[nn.Module, Binding] = WeakKeyDictionary()


@dataclass(eq=False)
class Binding:
    """A model's hooks, and what they saw in the forward pass that runs.

    rotate   how the model turns queries and keys; None where it does not
    tiles    whether the model's attention reads compressed states
    mask     as the model got it: [batch, tokens so far], None without padding
    turn     (cos, sin) of the tokens of this pass, [batch or 1, tokens, rotated width]
    """

    decoder: nn.Module
    rotate: Rotate | None
    tiles: bool
    before: str = ""
    mask: Any = None
    turn: tuple[Tensor, Tensor] | None = None
    handles: list[Any] = field(default_factory=list)
    _open: Reading | None = None

    def hand_over(self, keys: Tensor, reading: Reading) -> Tensor:
        """Keys that tell the attention where the rest is read."""
        self.check()
        found = keys.view_as(keys)
        setattr(found, _READING, reading)
        self._open = reading
        return found

    def check(self) -> None:
        """Raise unless the attention read what it was handed last."""
        if self._open is not None and not self._open.done:
            self._open = None
            raise RuntimeError(
                f"{type(self.decoder).__name__} did not read its compressed states: another attention runs than "
                f"{ATTENTION}; make the cache after the model's attention was chosen, or pass tiles=False"
            )
        self._open = None


def bind(model: nn.Module, tiles: bool = True) -> Binding:
    """The model's binding, made at the first call."""
    if model in _BOUND:
        return _BOUND[model]
    config: Any = model.config
    base: Any = getattr(model, "base_model", model)
    decoder = next((m for m in base.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList)), base)
    latent = getattr(config.get_text_config(), "kv_lora_rank", None) is not None
    rotate = None if latent else _rotation(decoder)
    named = bool(getattr(model, "_supports_attention_backend", False)) and not latent
    found = Binding(decoder, rotate, tiles and named, before=getattr(config, "_attn_implementation", None) or "eager")
    found.handles.append(base.register_forward_pre_hook(_masks(found, base), with_kwargs=True))
    found.handles.append(base.register_forward_hook(lambda *_: found.check()))
    if rotate is not None:
        for name, module in decoder.named_children():
            if name.startswith("rotary_emb"):
                found.handles.append(module.register_forward_hook(_turns(found)))
    if found.tiles:
        _register()
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
    _BOUND[model] = found
    return found


def release(model: nn.Module) -> None:
    """Take the hooks off a model and give it its own attention back; caches made for it are of no use any more."""
    found = _BOUND.pop(model, None)
    if found is not None:
        for handle in found.handles:
            handle.remove()
        if found.tiles:
            model.set_attn_implementation(found.before)  # type: ignore[operator]


def _masks(found: Binding, base: nn.Module) -> Callable[[nn.Module, Any, Any], None]:
    signature = inspect.signature(base.forward)

    def see(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        found.mask, found.turn = given.get("attention_mask", given.get("kwargs", {}).get("attention_mask")), None

    return see


def _turns(found: Binding) -> Callable[[nn.Module, Any, Any], None]:
    def see(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2:
            found.turn = (output[0], output[1])

    return see


def _rotation(decoder: nn.Module) -> Rotate | None:
    """How the model's own code turns keys, proved to be undone by the opposite angle; None without a rotary module."""
    rotary = [m for name, m in decoder.named_children() if name.startswith("rotary_emb")]
    if not rotary:
        return None
    layers = decoder.modules()
    attention = next((m for m in layers if hasattr(m, "layer_idx") and "Attention" in type(m).__name__), None)
    own = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if attention is None or own is None:
        raise PlanError(
            [f"{type(decoder).__name__}: how it rotates its keys is not known, so they cannot be compressed"]
        )

    def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = cos.shape[-1]
        # The function turns queries too: none are given.
        turned: Tensor = own(states[:, :0, :, :width], states[..., :width], cos, sin)[1]
        return turned if width == states.shape[-1] else torch.cat([turned, states[..., width:]], -1)

    _prove(rotate, rotary[0], decoder)
    return rotate


def _prove(rotate: Rotate, rotary: nn.Module, decoder: nn.Module) -> None:
    name = type(decoder).__name__
    device = next(decoder.parameters()).device
    with torch.no_grad():
        turn = rotary(torch.zeros(1, 3, 1, device=device), torch.tensor([[0, 5, 9]], device=device))
        if not isinstance(turn, tuple) or len(turn) != 2:
            raise PlanError([f"{name}: its rotary embedding gives {type(turn).__name__}, not cosines and sines"])
        cos, sin = turn
        x = torch.randn(1, 2, 3, cos.shape[-1], device=device)
        back = rotate(rotate(x, cos, sin), *opposite(cos, sin))
    if float((back - x).abs().max()) > 1e-4:
        raise PlanError(
            [f"{name}: its rotation of keys is not undone by the opposite angle; this cache cannot hold it"]
        )


def opposite(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What undoes a rotation, rounding and scale (YaRN's attention factor) included: float32."""
    cos, sin = cos.float(), sin.float()
    square = cos.square() + sin.square()
    return cos / square, -sin / square


def _register() -> None:
    """Make the attention function known to transformers."""
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ModuleNotFoundError:
        raise MissingExtra("transformers", "models", "a compressed cache") from None

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        reading: Reading | None = getattr(key, _READING, None)
        if reading is None:
            found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
            return found
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        return attend(reading, query, attention_mask, scale).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
