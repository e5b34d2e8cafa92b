"""Gram matrices of the inputs of linear layers: G = X^T X / rows (RegMean, arXiv:2212.09849, eq. 2)."""

from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import NumericError, WeightsmithError
from weightsmith.observe.data import Batch, Example, batches
from weightsmith.observe.files import Statistic
from weightsmith.observe.memory import available_memory, size_text
from weightsmith.observe.model import LoadedModel, resting

__all__ = ["full_precision", "gram"]

_log = logging.getLogger(__name__)

_CHUNK = 1024
"""Rows per product.  Products are float32 (as exact as the activations, twice as fast as float64), and are added
up in float64: the running sum over 10^5 rows is where float32 would lose the small eigen-directions that the
inverse in RegMean amplifies, not the product of a thousand rows."""


def gram(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    batch: int = 8,
    skip_first: bool = False,
    share: bool = True,
    selected: Callable[[str], bool] = lambda name: True,
    progress: Callable[[int, int], None] | None = None,
) -> Statistic:
    """Observe the inputs of every linear layer, under its weight's name: [d_in, d_in], float32.

    Padding never counts; `skip_first` leaves out each sequence's first token as well (the BOS token's huge
    activations would dominate G).  Layers that get the very same tensor (q/k/v, gate/up) share one matrix.
    Not observed, and listed as skipped: a weight that is tied to another one, a layer that never runs.
    Raises WeightsmithError if the matrices do not fit into memory, NumericError for non-finite ones.
    """
    layers, skipped = _linear_layers(loaded, selected)
    with resting(loaded.module), torch.no_grad(), full_precision():
        calls = _trace(loaded, layers, examples[0])
        calls |= {name: () for name in layers if name not in calls}  # may run on other data: a router's choice
        leaders = _leaders(calls) if share else {name: name for name in calls}
        sums = _Sums(layers, leaders, _home(layers, leaders, loaded.device))
        done = 0
        with sums.hooked():
            for part in batches(examples, batch):
                sums.begin(part, skip_first, tokens=not part.inputs.is_floating_point())
                loaded.run(part.inputs, part.mask)
                sums.end()
                done += part.inputs.shape[0]
                if progress is not None:
                    progress(done, len(examples))
    tensors = sums.finish()
    aliases = {name: leader for name, leader in sums.aliases.items() if leader in tensors}
    for name in layers:
        if name not in tensors and name not in aliases:
            skipped[name] = "the layer never ran on this data"
    return Statistic(
        tensors=tensors,
        rows=sums.rows,
        counts={name: sums.counts[name] for name in tensors},
        aliases=aliases,
        transposed=[name for name, layer in layers.items() if _is_conv1d(layer) and name not in skipped],
        skipped=skipped,
    )


# --- which layers, and which of them see the same input --------------------------------------------


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is [in, out].  Only a process that has transformers can hold one."""
    known = sys.modules.get("transformers.pytorch_utils")
    return known is not None and isinstance(module, known.Conv1D)


def _width(layer: nn.Module) -> int:
    """Number of inputs."""
    weight: Any = layer.weight
    width: int = weight.shape[0 if _is_conv1d(layer) else 1]
    return width


def _linear_layers(loaded: LoadedModel, selected: Callable[[str], bool]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Weight's name in the checkpoint -> layer, and name -> reason for those that are left out."""
    owners: dict[int, list[str]] = {}
    for name, parameter in loaded.module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for prefix, module in loaded.module.named_modules():
        if not isinstance(module, nn.Linear) and not _is_conv1d(module):
            continue
        name = f"{prefix}.weight".lstrip(".")
        others = [n for n in owners[id(module.weight)] if n != name]
        if not selected(name):
            continue
        stored = loaded.names.name(name)
        if others:
            skipped[stored or name] = f"tied to {loaded.names.name(*others) or others[0]}"
        elif stored is None:
            skipped[name] = "the checkpoint does not hold it as one tensor of this shape"
        else:
            layers[stored] = module
    if not layers:
        raise WeightsmithError(f"{loaded.label}: no linear layer to take a gram of; gram covers nn.Linear and Conv1D")
    return layers, skipped


class _Inputs:
    """Tells whether two layers of one forward pass get the very same tensor.

    An address alone does not: memory is reused as soon as a tensor is freed.  So the tensor must still be
    alive, at the same place, and not written to since.
    """

    def __init__(self) -> None:
        self._alive: list[tuple[weakref.ref[Tensor], tuple[Any, ...], int]] = []
        self._next = 0

    def token(self, x: Tensor) -> int:
        """The number of this input; equal numbers mean the same input."""
        place = (x.data_ptr(), x._version, tuple(x.shape), x.stride(), x.dtype)
        self._alive = [entry for entry in self._alive if entry[0]() is not None]
        for _, known, number in self._alive:
            if known == place:
                return number
        self._next += 1
        self._alive.append((weakref.ref(x), place, self._next))
        return self._next


@contextlib.contextmanager
def _hooked(layers: Mapping[str, nn.Module], seen: Callable[[str, Tensor, int], None]) -> Iterator[None]:
    """Call `seen(name, input, number of the input)` before each run of a layer."""
    inputs = _Inputs()

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            seen(name, x, inputs.token(x))

        return hook

    handles = [layer.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _trace(loaded: LoadedModel, layers: Mapping[str, nn.Module], example: Example) -> dict[str, tuple[int, ...]]:
    """The inputs' numbers in each layer's runs on one example; layers in the order of their first run."""
    calls: dict[str, list[int]] = {}
    with _hooked(layers, lambda name, x, number: calls.setdefault(name, []).append(number)):
        loaded.run(example.inputs[None])
    return {name: tuple(numbers) for name, numbers in calls.items()}


def _leaders(calls: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Layer -> the first layer whose runs all have the same inputs as its own."""
    first: dict[tuple[int, ...], str] = {}
    return {name: first.setdefault(numbers, name) if numbers else name for name, numbers in calls.items()}


# --- summing ---------------------------------------------------------------------------------------


def _home(layers: Mapping[str, nn.Module], leaders: Mapping[str, str], device: torch.device) -> torch.device:
    """Where the float64 sums are kept: beside the model if they fit there, else in main memory."""
    widths = [_width(layers[name]) for name in dict.fromkeys(leaders.values())]
    needed = sum(8 * width * width for width in widths)
    text = f"{len(widths)} gram matrices need {size_text(needed)}"
    _log.info("%s", text)
    free = available_memory(device)
    if free is None or needed <= 0.9 * free:
        return device
    if device.type != "cpu":
        return _home(layers, leaders, torch.device("cpu"))
    raise WeightsmithError(
        f"{text} of memory, {size_text(free)} is free; observe some blocks at a time, each into a folder of its own: "
        "layers = (0, 8), then (8, 16), ..."
    )


class _Sums:
    """The running sums X^T X, one per leader, and the row counts."""

    def __init__(self, layers: Mapping[str, nn.Module], leaders: Mapping[str, str], home: torch.device) -> None:
        self.aliases = {name: leader for name, leader in leaders.items() if name != leader}
        self.counts = dict.fromkeys(layers, 0)
        self.rows = 0
        self._layers, self._leaders, self._home = layers, leaders, home
        self._sums: dict[str, Tensor] = {}
        self._calls: dict[str, list[int]] = {}
        self._keep: Tensor | None = None
        self._batch = 0

    def hooked(self) -> contextlib.AbstractContextManager[None]:
        return _hooked(self._layers, self._see)

    def begin(self, part: Batch, skip_first: bool, tokens: bool) -> None:
        """A forward pass follows.  tokens: inputs are [batch, tokens], and each token is a row."""
        self._batch = part.inputs.shape[0]
        self._calls = {name: [] for name in self._layers}
        self._keep = None
        if not tokens:
            self.rows += self._batch
            return
        keep = torch.ones(part.inputs.shape, dtype=torch.bool) if part.mask is None else part.mask.clone()
        if skip_first:
            keep[:, 0] = False
        self.rows += int(keep.sum())
        self._keep = None if keep.all() else keep

    def end(self) -> None:
        """The forward pass is over: layers that share a matrix must have run equally often."""
        for name, leader in self.aliases.items():
            if len(self._calls[name]) != len(self._calls[leader]):
                raise self._unshared(name, leader)

    def finish(self) -> dict[str, Tensor]:
        """Leader -> G, in the model's order.  Sums are given up one by one, so that the peak stays at their size."""
        grams: dict[str, Tensor] = {}
        for name in self._layers:
            total = self._sums.pop(name, None)
            if total is None or not self.counts[name]:
                continue
            mean = (total + total.T).div_(2 * self.counts[name])  # products are symmetric only up to rounding
            grams[name] = mean.to("cpu", torch.float32)
            if not torch.isfinite(grams[name]).all():
                raise NumericError(f"{name}: NaN or Inf in the layer's inputs; the model or the data is damaged")
        return grams

    def _see(self, name: str, x: Tensor, number: int) -> None:
        runs, leader = self._calls[name], self._leaders[name]
        runs.append(number)
        if leader != name:
            if self._calls[leader][len(runs) - 1 : len(runs)] != [number]:
                raise self._unshared(name, leader)
            return
        rows = self._rows(name, x.detach())
        self.counts[name] += rows.shape[0]
        if name not in self._sums:
            self._sums[name] = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=self._home)
        for chunk in torch.split(rows, _CHUNK):
            chunk = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
            self._sums[name] += (chunk.T @ chunk).to(self._home, torch.float64)

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """The input as rows [n, d_in], padding left out."""
        keep = self._keep
        if keep is None:
            return x.reshape(-1, x.shape[-1])
        keep = keep.to(x.device)
        if x.shape[:-1] == keep.shape:
            return x[keep]
        if x.ndim == 2 and x.shape[0] == keep.numel():
            return x[keep.reshape(-1)]
        if x.ndim == 2 and x.shape[0] == self._batch:
            return x  # one row per sequence (a pooled state)
        raise WeightsmithError(
            f"{name}: input of shape {tuple(x.shape)} beside tokens of shape {tuple(keep.shape)}: nothing says which "
            "rows are padding; observe with batch = 1 and without skip_first"
        )

    def _unshared(self, name: str, leader: str) -> WeightsmithError:
        return WeightsmithError(
            f"{name} and {leader} had the same input in the first example but not in a later one; "
            "observe with share = False"
        )


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 in the products, whatever the process has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
