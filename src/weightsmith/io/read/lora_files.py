"""LoRA files without adapter_config.json: those of diffusers, of kohya's scripts, and of LyCORIS.

diffusers  `unet.down_blocks.0.attn.to_q.lora_A.weight`; alpha in the header's `lora_adapter_metadata`, or nowhere
kohya      `lora_unet_down_blocks_0_attn_to_q.lora_down.weight`, `.lora_up.weight` and `.alpha`
LyCORIS    the same names with parts of its own (`hada_w1_a`, `lokr_w1`, `diff`, ...), also `lycoris_...`

Such a file is never a model: its tensors are factors, which mean nothing one by one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import SourceError, some
from weightsmith.core.keys import Key
from weightsmith.io.read.adapter import CONFIG, HINTS, UNREAD_HINTS, scale_of
from weightsmith.io.read.folder import FolderSource
from weightsmith.io.read.lora import PREFIX, Adapter, Module
from weightsmith.io.read.lora_names import ROWS_OF_LINEAR1
from weightsmith.io.read.lycoris import PARTS, lycoris_update
from weightsmith.io.read.mlx_lora import read_folder
from weightsmith.io.read.pickle import PickleSource
from weightsmith.io.read.safetensors import SafetensorsSource
from weightsmith.io.read.small import parse_json, short
from weightsmith.io.read.source import Source
from weightsmith.io.read.svfit import Singular
from weightsmith.io.read.updates import Product
from weightsmith.io.url import Url, parse_url

__all__ = ["lora_kind", "read_adapter", "read_lora_file", "refuse_unread"]

_ENDINGS = {
    "A": tuple(f"{a}.weight" for a in ("lora_A", "lora_A.default", "lora_down", "lora.down", "lora_linear_layer.down")),
    "B": tuple(f"{b}.weight" for b in ("lora_B", "lora_B.default", "lora_up", "lora.up", "lora_linear_layer.up")),
    "mid": ("lora_mid.weight",),
    "alpha": ("alpha",),
    "bias": ("lora_B.bias",),
    "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale"),
    **{part: (part,) for part in (*PARTS, "diff", "diff_b", "w_norm", "b_norm")},
}
_PART_OF = {ending: part for part, endings in _ENDINGS.items() for ending in endings}
_SPLIT = re.compile(rf"(?P<module>.+)\.(?P<ending>{'|'.join(map(re.escape, sorted(_PART_OF, key=len, reverse=True)))})")
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
_XLABS = re.compile(
    r"(?:diffusion_model\.)?(?P<stack>double|single)_blocks\.(?P<block>\d+)\.processor\.(?P<what>qkv|proj)_lora(?P<side>[12]?)"
    r"\.(?P<part>down|up)\.weight"
)
_NOT_IN_MODELS = frozenset(part for part in _ENDINGS if part not in ("alpha", "bias", "magnitude"))
_FLUX = ("double_blocks", "single_blocks", "single_transformer_blocks")
METADATA = "lora_adapter_metadata"
_UNREAD = re.compile(
    r"(?:.+\.(?P<part>oft_blocks|oft_diag|oft_[rR]|on_input|ia3_l)|(?:lora|lycoris)_[^.]+\.b2\.weight)(\..+)?"
)
"""Names that only adapters of other kinds have: OFT, (IA)^3, GLoRA."""


def lora_kind(names: Iterable[str]) -> str | None:
    """'kohya', 'diffusers' or 'peft' for the names of a LoRA's tensors; None for those of a model."""
    for name in names:
        found = _split(name) if any(hint in name for hint in HINTS) else None
        if found is not None and found[1] in _NOT_IN_MODELS:
            if name.startswith(PREFIX):
                return "peft"
            return "diffusers" if "." in found[0] else "kohya"
    return None


def refuse_unread(source: Source) -> None:
    """Raise SourceError where a source is an adapter of a kind that is not read; no model has such tensors."""
    for name in source.keys:
        found = _UNREAD.fullmatch(name) if any(hint in name for hint in UNREAD_HINTS) else None
        if found is not None:
            kind = {"of": "OFT", "on": "(IA)^3", "ia": "(IA)^3"}.get((found["part"] or "")[:2], "GLoRA")
            raise SourceError(
                f"{source}: an {kind} adapter ({name}), not a model; of such files only LoRA, DoRA, LoHa, LoKr and "
                "full differences are read: put it into its base with the program that made it, and give the result"
            )


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in a PEFT folder or LoRA file, or at a URL (then the files are copied first: they are small)."""
    from weightsmith.io.read.remote_source import local_copy

    url = parse_url(path)
    place = local_copy(url) if isinstance(url, Url) else (url or Path(path).expanduser())
    label = str(url or path)
    if (place / CONFIG).is_file():
        adapter = read_folder(place, label=label)
        for module in adapter.modules.values():
            if isinstance(module.update, Singular):
                module.update.needs_vectors(adapter.file)
        return adapter
    if place.is_dir() or place.suffix in (".safetensors", ".bin", ".pt"):
        source = _opened(place)
        if source is not None and lora_kind(source.keys) is not None:
            return _written_back(read_lora_file(source, label))
        if source is not None:
            refuse_unread(source)
    raise SourceError(f"{path}: no LoRA adapter here (no {CONFIG}, and no LoRA file)")


def _written_back(adapter: Adapter) -> Adapter:
    """The adapter, unless it has modules that no file could name again."""
    if lone := next(
        (name for name in adapter.modules if re.search(rf"single_blocks_\d+_{ROWS_OF_LINEAR1}$", name)), None
    ):
        raise SourceError(
            f"{adapter.label}: {lone} is a part of a layer by XLabs' names, which the result has no name for; merge it "
            'into its base with "weightsmith merge"'
        )
    return adapter


def _opened(place: Path) -> Source | None:
    try:
        if place.is_dir():
            return FolderSource(place)
        return SafetensorsSource(place) if place.suffix == ".safetensors" else PickleSource(place)
    except SourceError:
        if place.exists() and not place.is_dir():
            raise
        return None


def read_lora_file(source: Source, label: str = "") -> Adapter:
    """The adapter that a LoRA file holds."""
    label = label or source.origin.label
    source.prepare()
    path = next((at for at in source.origin.locations if at.is_file()), None) or Path(label)
    kind = lora_kind(source.keys)
    if kind == "peft":
        if (path.parent / CONFIG).is_file():
            return read_folder(path.parent, label=label)
        raise SourceError(f"{label}: the weights of a PEFT adapter without its {CONFIG}; give the folder that has both")
    parts = _parts(source, label)
    said, config = _metadata(path, source, label)
    scales, note = _scales(parts, source, config, label) if kind == "diffusers" else _kohya_scales(parts, source, label)
    modules = {name: module for name, own in parts.items() if (module := _module(name, own, source, scales, label))}
    shifts = {(name, leaf): own[part] for name, own in parts.items() for part, leaf in _SHIFTS.items() if part in own}
    return Adapter(label, path, source, said, modules, kind=kind or "", says=(note,), shifts=shifts)


_SHIFTS = {"diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
"""Differences that are added as they are: part of a module -> the tensor of it."""


def _split(name: str) -> tuple[str, str] | None:
    """(module, part) of a stored name; None for what belongs to no LoRA."""
    old = _PROCESSOR.search(name)  # the attention processors of early versions of diffusers
    if old is not None:
        module = name[: old.start()] + "." + ("to_out.0" if old[1] == "to_out" else old[1])
        return module, "A" if old[2] == "down" else "B"
    if (xlabs := _XLABS.fullmatch(name)) is not None:
        return _by_kohya(xlabs), "A" if xlabs["part"] == "down" else "B"
    found = _SPLIT.fullmatch(name)
    return None if found is None else (found["module"], _PART_OF[found["ending"]])


def _by_kohya(xlabs: re.Match[str]) -> str:
    """What kohya calls a module of XLabs' files for Flux; the rows of q, k and v in `linear1` have no name there."""
    stack, block, what = xlabs["stack"], xlabs["block"], xlabs["what"]
    if stack == "single":
        return f"lora_unet_single_blocks_{block}_{'linear2' if what == 'proj' else ROWS_OF_LINEAR1}"
    return f"lora_unet_double_blocks_{block}_{'txt' if xlabs['side'] == '2' else 'img'}_attn_{what}"


def _parts(source: Source, label: str) -> dict[str, dict[str, str]]:
    parts: dict[str, dict[str, str]] = {}
    strange = []
    for name in (*source.keys, *source.aliases):
        found = _split(name)
        if found is None:
            strange.append(name)
        elif found[1] in parts.setdefault(found[0], {}):
            raise SourceError(f"{label}: {name!r} is stored twice")
        else:
            parts[found[0]][found[1]] = name
    if strange:
        raise SourceError(f"{label}: a LoRA file with tensors that are no part of a LoRA: {some(strange)}")
    return parts


def _module(
    name: str, parts: Mapping[str, str], source: Source, scales: Mapping[str, float], label: str
) -> Module | None:
    """What a module's parts add to its weight; None where they shift it, or its bias, only."""
    where = f"{label}: {name!r}"
    magnitude = parts.get("magnitude")
    inward = False
    if "A" in parts or "B" in parts:
        if not {"A", "B"} <= parts.keys():
            raise SourceError(f"{where} has {', '.join(sorted(parts))} instead of both factors")
        a, b = (source.key(parts[part]) for part in "AB")
        update: Any = Product(a.name, b.name, a.shape, b.shape, *_middle(parts, source))
        good = len(a.shape) >= 2 and len(b.shape) >= 2 and a.floating and b.floating and set(b.shape[2:]) <= {1}
        grouped = len(a.shape) > 2 and b.shape[1] and not a.shape[0] % b.shape[1]
        if not good or (a.shape[0] != b.shape[1] and not grouped):
            raise SourceError(f"{where} has factors of shapes {list(b.shape)} and {list(a.shape)}")
    elif not parts.keys() & {*PARTS, "diff"} or ("diff" in parts and len(source.key(parts["diff"]).shape) < 2):
        return None
    else:
        update, _, _ = lycoris_update(parts, source, where)
    if magnitude is not None:
        shape = source.key(magnitude).shape
        inward = len(shape) > 1 and shape[0] == 1 and update.shape[0] != 1  # LyCORIS with wd_on_out=False
    scale = scales.get(name, 1.0)
    return Module(name, update, scale, magnitude=magnitude, inward=inward, bias=parts.get("bias"), bias_scale=scale)


def _middle(parts: Mapping[str, str], source: Source) -> tuple[str | None, tuple[int, ...]]:
    mid = parts.get("mid")
    return (mid, source.key(mid).shape[2:]) if mid is not None else (None, ())


# --- scales ------------------------------------------------------------------------------------------


def _metadata(path: Path, source: Source, label: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What is noted of the adapter as a whole, and diffusers' configuration for each component ('' for all)."""
    file = SafetensorsSource(path) if path.suffix == ".safetensors" and path.is_file() else source
    header = getattr(file, "header", None)
    notes: Mapping[str, str] = {} if header is None else header.metadata
    said = {"base_model_name_or_path": notes.get("ss_sd_model_name") or notes.get("ss_base_model_version")}
    text = notes.get(METADATA)
    if text is None:
        return said, {}
    found = parse_json(text.encode(), f"{label}: {METADATA}")
    if not isinstance(found, dict):
        raise SourceError(f"{label}: {METADATA} in its header is {short(found)}, not a configuration")
    configs: dict[str, dict[str, Any]] = {}
    for field, value in found.items():
        component, _, plain = field.rpartition(".")
        configs.setdefault(component, {})[plain] = value
    return said, configs


def _scales(
    parts: Mapping[str, Mapping[str, str]], source: Source, configs: Mapping[str, Mapping[str, Any]], label: str
) -> tuple[dict[str, float], str]:
    """alpha / r of each module as diffusers takes it, and where it comes from."""
    alphas = _alphas(parts, source, label)
    ranks = {name: rank for name, own in parts.items() if (rank := _rank(own, source))}
    if alphas and not configs:
        without = [name for name in ranks if name not in alphas]
        first = next(alphas[own] for name in source.keys for own, part in [_split(name) or ("", "")] if part == "alpha")
        said = "scales are its alpha / rank"
        if without:
            said = (
                f"{len(without)} modules have no alpha ({without[0]}): the first one of the file, {first:g}, counts "
                "there, as in diffusers' Flux loader"
            )
        return {name: alphas.get(name, first) / rank for name, rank in ranks.items()}, said
    if not configs:
        return {}, "no alpha in it or in its header: scale 1, as diffusers takes it"
    found = {}
    for name, rank in ranks.items():
        component = next((c for c in configs if c and name.startswith(f"{c}.")), "")
        config = configs.get(component)
        if config is not None:
            found[name] = scale_of({**config, "peft_type": "LORA"}, name.removeprefix(f"{component}."), rank)
    return found, f"scales are those of {METADATA} in its header"


def _kohya_scales(parts: Mapping[str, Mapping[str, str]], source: Source, label: str) -> tuple[dict[str, float], str]:
    """alpha / rank; where alphas are missing, what diffusers' loaders take."""
    alphas = _alphas(parts, source, label)
    ranks = {name: rank for name, own in parts.items() if (rank := _rank(own, source))}
    without = [name for name in ranks if name not in alphas]
    found = {name: alphas[name] / rank for name, rank in ranks.items() if name in alphas}
    if not without:
        return found, "scales are its alpha / rank"
    if not alphas:
        return {}, "no alpha in it: scale 1"
    if any(word in name for name in ranks for word in _FLUX):
        return (
            found,
            f"{len(without)} modules have no alpha ({without[0]}): scale 1 there, as in diffusers' Flux loader",
        )
    for name in without:
        own = [alpha for other, alpha in alphas.items() if _component(other) == _component(name)]
        usual = Counter(own or alphas.values()).most_common(1)[0][0]
        found[name] = usual / ranks[name]
    return found, (
        f"{len(without)} modules have no alpha ({without[0]}): the most common one of the file counts there, as in "
        "diffusers' loader for Stable Diffusion"
    )


def _component(name: str) -> str:
    """'unet', 'te1', ... of lora_unet_...: what the loader treats by itself."""
    return "_".join(name.split("_")[:2])


def _alphas(parts: Mapping[str, Mapping[str, str]], source: Source, label: str) -> dict[str, float]:
    found = {}
    for name, own in parts.items():
        if "alpha" in own:
            value = float(source.read(own["alpha"])) if source.key(own["alpha"]).numel == 1 else 0.0
            if not 0 < abs(value) < 1e30:
                raise SourceError(f"{label}: {own['alpha']!r} is {value:g}, not a scale")
            found[name] = value
    return found


def _rank(parts: Mapping[str, str], source: Source) -> int:
    """What alpha is divided by; 0 where it does not count (differences, LoKr of two whole matrices)."""
    keys: dict[str, Key] = {part: source.key(name) for part, name in parts.items()}
    for part in ("B", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in keys and len(keys[part].shape) >= 2:
            return keys["A"].shape[0] if part == "B" and "A" in keys else keys[part].shape[0]
    return 0
