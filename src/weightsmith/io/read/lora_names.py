"""Which weights of a base the modules of a LoRA file belong to: names of diffusers, of kohya, and of older layouts.

kohya writes a module's name with underscores for dots, behind the part that it lies in (`lora_unet_`, `lora_te1_`).
For Stable Diffusion XL these are the names of the original U-Net (`input_blocks_4_1_...`), for Flux those of the
original transformer (`double_blocks_0_img_attn_qkv`), whose fused matrices diffusers stores in parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

from weightsmith.core.errors import SourceError
from weightsmith.core.keys import Key
from weightsmith.io.read.lora import Adapter, Module
from weightsmith.io.read.modules import Modules
from weightsmith.io.read.source import Source

__all__ = ["ROWS_OF_LINEAR1", "Finder", "finder_of", "placed"]

Place = tuple[Module, tuple[Key, ...]]
"""A module of the file, and the weights that its rows belong to, one after the other."""

_PREFIX = re.compile(r"(?P<part>lora_unet|lora_prior_unet|lora_transformer|lora_te[123]?|lycoris|lora)_(?P<name>.+)")
_ROOTS = (
    *("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "text_encoder.", "text_encoder_2."),
    *("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", "text_model."),
)
"""What may stand before a module's name in a file that holds several parts of a pipeline."""
_ONLY: Mapping[str, tuple[str, ...]] = {
    "lora_te2": ("text_encoder_2.", "conditioner.embedders.1."),
    "lora_te1": ("text_encoder.", "conditioner.embedders.0."),
}
"""Parts whose names would fit others too, and where they lie in such a file."""

_SGM = (
    (r"^input_blocks_0_0$", "conv_in"),
    (r"^out_2$", "conv_out"),
    (r"^time_embed_0$", "time_embedding_linear_1"),
    (r"^time_embed_2$", "time_embedding_linear_2"),
    (r"^label_emb_0_0$", "add_embedding_linear_1"),
    (r"^label_emb_0_2$", "add_embedding_linear_2"),
    (r"_in_layers_2$", "_conv1"),
    (r"_out_layers_3$", "_conv2"),
    (r"_emb_layers_1$", "_time_emb_proj"),
    (r"_skip_connection$", "_conv_shortcut"),
)
ROWS_OF_LINEAR1 = "qkv"
"""What XLabs calls the first rows of a single block's `linear1`."""
_FLUX = {
    "img_attn_qkv": ("attn_to_q", "attn_to_k", "attn_to_v"),
    "txt_attn_qkv": ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"),
    "img_attn_proj": ("attn_to_out_0",),
    "txt_attn_proj": ("attn_to_add_out",),
    "img_mlp_0": ("ff_net_0_proj",),
    "img_mlp_2": ("ff_net_2",),
    "txt_mlp_0": ("ff_context_net_0_proj",),
    "txt_mlp_2": ("ff_context_net_2",),
    "img_mod_lin": ("norm1_linear",),
    "txt_mod_lin": ("norm1_context_linear",),
    "linear1": ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    ROWS_OF_LINEAR1: ("attn_to_q", "attn_to_k", "attn_to_v"),
    "modulation_lin": ("norm_linear",),
}
_FLUX_OTHERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed_timestep_embedder_linear_1",
    "time_in_out_layer": "time_text_embed_timestep_embedder_linear_2",
    "vector_in_in_layer": "time_text_embed_text_embedder_linear_1",
    "vector_in_out_layer": "time_text_embed_text_embedder_linear_2",
    "guidance_in_in_layer": "time_text_embed_guidance_embedder_linear_1",
    "guidance_in_out_layer": "time_text_embed_guidance_embedder_linear_2",
    "final_layer_linear": "proj_out",
}


def finder_of(adapter: Adapter, base: Source, modules: Modules) -> Finder:
    """Looks up modules by the kind of names that the adapter has."""
    return _Flat(base) if adapter.kind == "kohya" else _Dotted(base, modules)


def placed(adapter: Adapter, base: Source, modules: Modules) -> tuple[list[Place], list[str]]:
    """Where each module of a LoRA file belongs, and what is left out: parts of a pipeline that the base is not.

    Raises SourceError where only some modules of a part are found, or have another shape.
    """
    finder = finder_of(adapter, base, modules)
    parts: dict[str, list[Place]] = {}
    lost: dict[str, list[Module]] = {}
    for module in adapter.modules.values():
        part, keys = finder.find(module.name)
        if keys and _fits(module, keys):
            parts.setdefault(part, []).append((module, keys))
        else:
            lost.setdefault(part, []).append(module)
    for part, others in lost.items():
        if part in parts or (len(lost) == 1 and not parts):
            raise SourceError(_misfit(adapter, base, finder, others[0]))
    says = [
        f"{len(others)} modules of {part.removeprefix('lora_') or 'another part'} are left out: {base} has none of them"
        for part, others in lost.items()
    ]
    return [place for found in parts.values() for place in found], says


def _fits(module: Module, keys: Sequence[Key]) -> bool:
    outputs, inputs = sum(key.rows for key in keys), {key.row_numel for key in keys}
    return (outputs, inputs) == (module.update.shape[0], {prod(module.update.shape[1:])})


def _misfit(adapter: Adapter, base: Source, finder: Finder, module: Module) -> str:
    _, keys = finder.find(module.name)
    if not keys:
        return f"{adapter.label}: {module.name!r} belongs to no weight of {base}"
    return (
        f"{adapter.label}: {module.name!r} adapts a weight of shape {list(module.update.shape)}, but {keys[0].name!r} "
        f"in {base} is {list(keys[0].shape)}"
    )


class _Dotted:
    """Names with dots, behind the name of a pipeline's part or not."""

    def __init__(self, base: Source, modules: Modules) -> None:
        self._base, self._modules = base, modules

    def find(self, name: str) -> tuple[str, tuple[Key, ...]]:
        known = self._modules.stored(f"{name}.weight")
        part = name.partition(".")[0]
        return part, (self._base.key(known),) if known is not None else ()


class _Flat:
    """Names with underscores for dots."""

    def __init__(self, base: Source) -> None:
        self._flat: dict[str, dict[str, Key]] = {}
        for key in base.keys.values():
            module, _, leaf = key.name.rpartition(".")
            if leaf == "weight":
                for root, plain in _plain_names(module):
                    self._flat.setdefault(_flat(plain), {}).setdefault(root, key)
        downs = {name.split(".resnets.")[1].split(".")[0] for name in base.keys if "down_blocks.0.resnets." in name}
        self._layers = len(downs) or 2

    def find(self, name: str) -> tuple[str, tuple[Key, ...]]:
        found = _PREFIX.fullmatch(name)
        part, plain = (found["part"], found["name"]) if found else ("", name)
        for names in (((plain,),), self._elsewhere(plain)):
            for wanted in names:
                keys = tuple(key for one in wanted if (key := self._key(part, one)) is not None)
                if len(keys) == len(wanted):
                    return part, keys
        return part, ()

    def _key(self, part: str, flat: str) -> Key | None:
        """The weight of this name; in a file with several parts the one that lies in the right part."""
        found = self._flat.get(flat, {})
        rooted = {root: key for root, key in found.items() if root}
        wanted = _ONLY.get(part)
        if wanted and rooted:
            return next((key for key in rooted.values() if key.name.startswith(wanted)), None)
        return next(iter(found.values()), None) if len({key.name for key in found.values()}) == 1 else None

    def _elsewhere(self, name: str) -> Iterator[tuple[str, ...]]:
        """What a module of an original model is called in diffusers' layout: one name, or those of its parts."""
        yield (_sgm_to_diffusers(name, self._layers),)
        if name in _FLUX_OTHERS:
            yield (_FLUX_OTHERS[name],)
        block = re.fullmatch(r"(double|single)_blocks_(\d+)_(\w+)", name)
        if block is not None and block[3] in _FLUX:
            stack = "transformer_blocks" if block[1] == "double" else "single_transformer_blocks"
            yield tuple(f"{stack}_{block[2]}_{one}" for one in _FLUX[block[3]])
        if name.startswith("text_model_"):
            yield (name.removeprefix("text_model_"),)


Finder = _Dotted | _Flat


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _plain_names(module: str) -> Iterable[tuple[str, str]]:
    """(what stands before it, the module's name) for every root that it may lie behind."""
    yield "", module
    for root in _ROOTS:
        if module.startswith(root):
            yield root, module.removeprefix(root)


def _sgm_to_diffusers(name: str, layers: int) -> str:
    """The name in diffusers' U-Net of a module of the original one, which numbers its blocks through."""
    for pattern, replacement in _SGM:
        name = re.sub(pattern, replacement, name)
    block = re.fullmatch(r"(input_blocks|middle_block|output_blocks)_(\d+)(?:_(\d+))?_(\w+)", name)
    if block is None:
        return name
    stack, number, inner, rest = block[1], int(block[2]), block[3], block[4]
    if stack == "middle_block":
        place = ("resnets_0", "attentions_0", "resnets_1")[number] if number < 3 else ""
        return f"mid_block_{place}_{f'{inner}_' if inner else ''}{rest}"
    number -= stack == "input_blocks"
    at, layer = divmod(number, layers + 1)
    side = "down_blocks" if stack == "input_blocks" else "up_blocks"
    if rest == "op":
        return f"{side}_{at}_downsamplers_0_conv"
    if rest == "conv":
        return f"{side}_{at}_upsamplers_0_conv"
    kind = "resnets" if inner == "0" else "attentions"
    return f"{side}_{at}_{kind}_{layer}_{rest}"
