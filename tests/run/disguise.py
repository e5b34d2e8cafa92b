"""A device that is the CPU in disguise: real arithmetic under the rules of a GPU, where there is no GPU.

Its tensors say that they lie on `lazy:0`, which no build of torch computes on, and hold a tensor of the CPU.  As
with CUDA, an operation on tensors of two devices is an error, except

- copies (`copy_`, `to`),
- numbers (0-dim CPU tensors) in elementwise operations, and
- CPU indices into a tensor of the device;

and what a device's tensor holds is not to be had as a numpy array.  So code that forgets `device=` fails here as it
would there, and code that does not gives the CPU's bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from weightsmith.devices.accelerator import Host

__all__ = ["DEVICE", "Disguise", "Disguised"]

DEVICE = "lazy:0"
_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Disguised(Tensor):
    """A CPU tensor, `inner`, that says it lies elsewhere."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Disguised:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def tolist(self) -> Any:  # which torch refuses for subclasses, though not for devices
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return obey(func, args, kwargs or {})


def obey(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Carry an operation out on the CPU if a device would."""
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = any(isinstance(x, Disguised) for x in flat)
    device = kwargs.get("device")
    if there and func not in _COPIES:
        _refuse_mixture(func, args, flat)
    if device is not None:
        there = torch.device(device).type == "lazy"
        kwargs = {**kwargs, "device": "cpu" if there else device}
    elif func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], Disguised)
    out = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))
    known = {id(x.inner): x for x in flat if isinstance(x, Disguised)}

    def dressed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not there:
            return x
        return known[id(x)] if id(x) in known else Disguised(x)

    return tree_map(dressed, out)


def _bare(x: Any) -> Any:
    return x.inner if isinstance(x, Disguised) else x


def _refuse_mixture(func: Any, args: Any, flat: list[Tensor]) -> None:
    """As CUDA does: RuntimeError."""
    strangers = [x for x in flat if not isinstance(x, Disguised)]
    if torch.Tag.pointwise in func.tags:
        strangers = [x for x in strangers if x.ndim]
    elif func._schema.name.removeprefix("aten::") in _INDEXED and isinstance(args[0], Disguised):
        strangers = []
    if strangers:
        shapes = [list(x.shape) for x in strangers]
        raise RuntimeError(
            f"{func}: expected all tensors to be on {DEVICE}, but those of shape {shapes} are on the CPU"
        )


class _Factories(TorchDispatchMode):
    """Makes what is asked for on the device, without tensors to ask, disguised too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return obey(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """`torch.tensor([1.0], device=...)` allocates without asking a dispatch mode: make it here, then copy it there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == "lazy":
            return func(*args, **{**kwargs, "device": None}).to(device)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Disguise(Host):
    """The accelerator of disguised tensors."""

    kind = "disguise"

    def devices(self) -> tuple[str, ...]:
        return (DEVICE,) * self.count

    @contextlib.contextmanager
    def using(self, device: str, stream: Any) -> Iterator[None]:
        with _Factories(), _FromNumbers():
            yield
