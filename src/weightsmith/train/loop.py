"""The loop: gradients of a sum over examples, accumulated; checkpoints that go on to the same bits.

It knows a module, an optimizer and a loss of example numbers; no file format, no architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from weightsmith.core.errors import NumericError

__all__ = ["Loss", "Pace", "Row", "State", "Store", "fit"]

Loss = Callable[[Sequence[int]], tuple[Tensor, int]]
"""Numbers of examples -> the sum of their losses, and over how many tokens or examples."""


@dataclass(frozen=True)
class Pace:
    """How long, how fast, in which order."""

    steps: int
    batch: int
    accumulation: int = 1
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float = 0.0
    clip: float | Literal["none"] = "none"
    every: int = 100
    seed: int = 0

    def rate(self, step: int) -> float:
        """The factor on the learning rate of step 1 .. steps: up to 1 over the warm-up, then down to 0."""
        rising = math.ceil(self.warmup * self.steps)
        if step <= rising:
            return step / rising
        done = (step - rising - 1) / max(self.steps - rising, 1)
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[self.schedule]

    def micro_batches(self, step: int, count: int) -> Iterator[list[int]]:
        """The examples of a step, one forward pass after the other.

        A function of the step alone, so that nothing of it has to be saved: each epoch is a permutation of all `count`
        examples cut into batches, without the tail.
        """
        size = min(self.batch, count)
        for number in range((step - 1) * self.accumulation, step * self.accumulation):
            epoch, place = divmod(number, count // size)
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            yield torch.randperm(count, generator=draw)[place * size : (place + 1) * size].tolist()


@dataclass(frozen=True)
class Row:
    """A point of the curve: means over the steps since the last one; validation afterwards; figures of one's own."""

    step: int
    loss: float | None
    rate: float
    gradient: float | None
    valid: float | None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """Everything that a run needs to go on: after which step, the curve so far, tensors, and plain values."""

    step: int
    rows: tuple[Row, ...]
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


class Store(Protocol):
    """Where checkpoints go."""

    def save(self, state: State) -> None: ...
    def last(self) -> State | None: ...


def fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    examples: Sequence[int],
    pace: Pace,
    *,
    valid: Sequence[int] = (),
    store: Store | None = None,
    bf16: bool = False,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[], Mapping[str, float]] = dict,
    update: Callable[[int], object] | None = None,
    whole: Callable[[Sequence[int]], Tensor] | None = None,
) -> list[Row]:
    """Train a module in place, and return the curve.

    examples, valid  numbers that `loss` knows.  Of a step's examples the mean loss counts, however they are cut into
                     forward passes
    store            has its last checkpoint taken up, and gets one every `pace.every` steps and at the end
    bf16             autocast
    watch            more figures of a row, taken in eval mode without gradients
    update           carries out a step, given its number; default: `optimizer.step()`
    whole            a term of all examples of a step together, however they are cut, that is added to their mean loss

    The same machine and thread count give the same bits, broken off or not.  Errors: NumericError with the step and the
    examples where the loss or its gradient is not finite; the last checkpoint stays.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    device = next(iter(trained.values())).device
    base = [float(group["lr"]) for group in optimizer.param_groups]
    devices = [device] if device.type == "cuda" else []

    def run(numbers: Sequence[int]) -> tuple[Tensor, int]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return loss(numbers)

    def row(step: int, loss: float | None, rate: float, gradient: float | None) -> Row:
        return Row(step, loss, rate, gradient, _mean(module, run, valid, pace.batch), _figures(module, watch))

    with torch.random.fork_rng(devices):
        torch.manual_seed(pace.seed)
        found = store.last() if store is not None else None
        rows, first = (list(found.rows), found.step) if found else ([row(0, None, 0.0, None)], 0)
        if found:
            _restore(found, trained, optimizer, devices)
        sums: list[tuple[float, float]] = []
        for step in range(first + 1, pace.steps + 1):
            module.train()
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * pace.rate(step)
            batches = [[examples[i] for i in micro] for micro in pace.micro_batches(step, len(examples))]
            sums.append(_step(list(trained.values()), optimizer, run, batches, pace.clip, step, update, whole))
            if step % pace.every == 0 or step == pace.steps:
                means = [sum(values) / len(sums) for values in zip(*sums, strict=True)]
                rows.append(row(step, means[0], pace.rate(step), means[1]))
                sums = []
                if store is not None:
                    store.save(_state(step, rows, trained, optimizer, devices))
            if progress is not None:
                progress(step, pace.steps)
    module.eval()
    return rows


def _step(
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    run: Loss,
    batches: list[list[int]],
    clip: float | Literal["none"],
    step: int,
    update: Callable[[int], object] | None,
    whole: Callable[[Sequence[int]], Tensor] | None,
) -> tuple[float, float]:
    """One step; the mean loss and the norm of the gradient."""
    used = [number for batch in batches for number in batch]
    optimizer.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for batch in batches:
        value, own = run(batch)
        if not math.isfinite(number := value.detach().item()):
            raise NumericError(f"step {step}: the loss is {number} on examples {batch}; lower the learning rate")
        torch.autograd.backward(value)
        total, count = total + number, count + own
    if not count:
        raise NumericError(f"step {step}: examples {used} have nothing to predict (texts of one token?)")
    if whole is not None:
        term = whole(used) * count
        torch.autograd.backward(term)
        total += term.detach().item()
    # The sum over all tokens of the step, divided by their number: unequal micro-batches weigh as they should.
    for p in params:
        if p.grad is not None:
            p.grad /= count
    norm = nn.utils.clip_grad_norm_(params, math.inf if clip == "none" else clip).item()
    if not math.isfinite(norm):
        raise NumericError(f"step {step}: the gradient is {norm} on examples {used}; lower the learning rate")
    optimizer.step() if update is None else update(step)
    return total / count, norm


@torch.no_grad()
def _figures(module: nn.Module, watch: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
    module.eval()
    return dict(watch())


@torch.no_grad()
def _mean(module: nn.Module, run: Loss, numbers: Sequence[int], batch: int) -> float | None:
    """The mean loss of validation examples; None without any."""
    if not numbers:
        return None
    module.eval()
    parts = [run(numbers[i : i + batch]) for i in range(0, len(numbers), batch)]
    count = sum(own for _, own in parts)
    return sum(value.item() for value, _ in parts) / count if count else None


# --- checkpoints -----------------------------------------------------------------------------------


def _state(
    step: int,
    rows: Sequence[Row],
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    devices: Sequence[torch.device],
) -> State:
    saved = optimizer.state_dict()
    tensors = {f"model.{name}": p.detach() for name, p in trained.items()}
    plain: dict[str, dict[str, Any]] = {}
    for number, state in saved["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{number}.{key}"] = value
            else:
                plain.setdefault(str(number), {})[key] = value
    tensors["random.cpu"] = torch.get_rng_state()
    tensors |= {f"random.cuda.{device.index or 0}": torch.cuda.get_rng_state(device) for device in devices}
    return State(step, tuple(rows), tensors, {"optimizer": plain, "rows": [asdict(row) for row in rows]})


@torch.no_grad()
def _restore(
    state: State,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    devices: Sequence[torch.device],
) -> None:
    for name, p in trained.items():
        p.copy_(state.tensors[f"model.{name}"])
    numbered: dict[int, dict[str, Any]] = {int(n): dict(own) for n, own in state.values["optimizer"].items()}
    for name, tensor in state.tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            numbered.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(state.tensors["random.cpu"])
    for device in devices:
        torch.cuda.set_rng_state(state.tensors[f"random.cuda.{device.index or 0}"], device)
