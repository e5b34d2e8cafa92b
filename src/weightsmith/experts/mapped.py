"""Running a mixture with fewer experts as it was meant: the router's original rows, their choices mapped.

Plain transformers loads such a folder, too, where all layers have as many experts: with the router's rows averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import MissingExtra, SourceError
from weightsmith.core.keys import layer_of
from weightsmith.core.lazy import torch
from weightsmith.experts.maps import read_map
from weightsmith.io.read.experts import packed_like_memory
from weightsmith.io.read.folder import FolderSource

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["load"]


def load(folder: str | Path, *, coded: str | Path | None = None, **options: Any) -> nn.Module:
    """The model in a folder that `moe shrink` has written, in eval mode.

    coded    the compressed folder that `folder` was restored from, which holds the map
    options  of transformers' from_pretrained, as dtype; default: the stored dtype

    Every expert of the original is still chosen by its own row and answered by the one that it was merged into; two
    choices of one group add their gates.  Layers may have unlike numbers of experts.
    Raises SourceError for a folder without a map, MissingExtra without transformers.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise MissingExtra("transformers", "models", "running a model") from None
    place = Path(folder)
    known = read_map(place if coded is None else Path(coded))
    unlike = len(set(known.counts.values())) > 1
    if unlike:
        options["ignore_mismatched_sizes"] = True
    log = transformers.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()  # what does not match is put in below
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(place, **{"dtype": "auto", **options}).eval()
    finally:
        log.set_verbosity(before)
    source = packed_like_memory(FolderSource(place))
    modules = {_block(f"{n}.x"): m for n, m in model.named_modules() if hasattr(m, "experts")}
    for name, labels in known.labels.items():
        module = modules.get(_block(name))
        if module is None:
            raise SourceError(f"{place}: {name} has no counterpart in the model that transformers builds")
        if unlike:
            _put_experts(module.experts, {k.rpartition(".")[2]: source.read(k) for k in source.keys
                                          if _block(k) == _block(name) and ".experts." in k})  # fmt: skip
            _put_router(module, {k.rpartition(".")[2]: source.read(k) for k in source.keys
                                 if _block(k) == _block(name) and _of_router(k)})  # fmt: skip
        if routers := {n: t for n, t in known.routers.items() if _block(n) == _block(name)}:
            _put_router(module, {n.rpartition(".")[2]: t for n, t in routers.items()})
            _map_choices(module, labels)
    made: nn.Module = model
    return made


def _block(name: str) -> tuple[str, int]:
    """(last word of the stack, number): the same in files and in memory."""
    found = layer_of(name)
    return ("", -1) if found is None else (found[0].rpartition(".")[2], found[1])


def _of_router(name: str) -> bool:
    *_, module, word = name.split(".")
    return module in ("gate", "router") or word == "e_score_correction_bias"


def _put_experts(experts: Any, tensors: Mapping[str, Tensor]) -> None:
    """Another number of experts."""
    for word, value in tensors.items():
        old = getattr(experts, word)
        setattr(experts, word, torch.nn.Parameter(value.to(old.device, old.dtype), requires_grad=False))
    experts.num_experts = len(next(iter(tensors.values())))


def _put_router(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Another number of rows."""
    router: Any = getattr(module, "gate", None) or module.router
    for word, value in tensors.items():
        owner: Any = router if hasattr(router, word) else module  # MiniMax keeps the bias beside its router
        old = getattr(owner, word)
        value = value.to(old.device, old.dtype)
        if isinstance(old, torch.nn.Parameter):
            setattr(owner, word, torch.nn.Parameter(value, requires_grad=False))
        else:
            owner.register_buffer(word, value)
        for field in ("num_experts", "n_routed_experts", "out_features"):
            if hasattr(router, field):
                setattr(router, field, len(value))


def _map_choices(module: nn.Module, labels: Tensor) -> None:
    """Let choices of the original's experts be answered by the new ones."""
    experts: Any = module.experts
    device = next(experts.parameters()).device
    experts.register_buffer("expert_map", labels.to(device), persistent=False)
    if type(experts).__name__.startswith("Llama4"):
        experts.forward = _of_rows(experts)
        return

    def mapped(
        inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = list(kwargs)
        given = [*args, *kwargs.values()]
        given[1] = inner.expert_map[given[1]]  # type: ignore[index]
        return tuple(given[: len(args)]), dict(zip(names, given[len(args) :], strict=True))

    experts.register_forward_pre_hook(mapped, with_kwargs=True)


def _of_rows(experts: Any) -> Callable[[Tensor], Tensor]:
    """Llama 4 hands over a block of rows for each expert, in order: each is read with its new expert's matrices."""

    def mapped(rows: Tensor) -> Tensor:
        up, down = (matrix[experts.expert_map] for matrix in (experts.gate_up_proj, experts.down_proj))
        gate, value = torch.bmm(rows.reshape(len(up), -1, rows.shape[-1]), up).chunk(2, dim=-1)
        made: Tensor = torch.bmm(value * experts.act_fn(gate), down).reshape(-1, down.shape[-1])
        return made

    return mapped
